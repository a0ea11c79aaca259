"""Joint attention inside a module that DDP and FSDP2 spread over two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = """
import itertools, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.fsdp import fully_shard
if not torch.cuda.is_available():
    from tests import interpreter
    interpreter.install()
from sda_fast import Hierarchy, ops

class Block(torch.nn.Module):
    def __init__(self, implementation):
        super().__init__()
        self.qkv, self.implementation = torch.nn.Linear(32, 96), implementation

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        return ops.hierarchical_attention(
            q, k, v, Hierarchy((2, 1)), 3, 4, implementation=self.implementation
        ).flatten(2)

def gradients(model, x):
    model(x).square().sum().backward()
    full = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    return [full(p.grad) for p in model.parameters()]

rank, wraps = int(sys.argv[1]), {"ddp": DistributedDataParallel, "fsdp2": fully_shard}
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
for wrap, implementation in itertools.product(wraps, ("fused", "split")):
    torch.manual_seed(0)
    whole = Block(implementation)
    batch = torch.randn(2, 18, 32)
    torch.manual_seed(0)
    spread = wraps[wrap](Block(implementation))
    # both take the mean over processes of gradients of sums
    for mine, all in zip(gradients(spread, batch[rank : rank + 1]), gradients(whole, batch)):
        torch.testing.assert_close(mine, all / 2, msg=lambda text: f"{wrap}: {text}")
    print("agreed", wrap, implementation)
dist.destroy_process_group()
"""
AGREED = [f"agreed {wrap} {implementation}" for wrap in ("ddp", "fsdp2")
          for implementation in ("fused", "split")]  # fmt: skip


def test_two_processes_get_the_gradients_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_INTERPRET"] = "1"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), address],
            env=environment, cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for worker in workers:
            said, errors = worker.communicate(timeout=120)
            assert said.splitlines() == AGREED, errors[-3000:]
    finally:
        for worker in workers:
            worker.kill()
