"""What the card at hand can do at best: a large copy and a large matrix product."""

import torch

from bench.measure import quantiles, take_turns

GPU_COPY, GPU_MATMUL = 2 << 30, 8192
"""Bytes of the buffer; rows and columns of the matrices, bf16."""
CPU_COPY, CPU_MATMUL = 16 << 20, 512
"""The same on a CPU, float32: to go through the motions, no roof of anything."""


def measure_roofs(device: torch.device, reps: int = 20) -> dict[str, float]:
    """Rates at the 20th percentile of the times.

    Args:
        device: where.
        reps: of each; on a GPU they bring the clocks up, too.

    Returns:
        "copy", bytes a second, read and written ones counted; "matmul", FLOP a second.
    """
    on_gpu = device.type == "cuda"
    size = GPU_MATMUL if on_gpu else CPU_MATMUL
    dtype = torch.bfloat16 if on_gpu else torch.float32
    length = (GPU_COPY if on_gpu else CPU_COPY,)
    source = torch.randint(256, length, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    steps = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(a, b, out=product),
    }
    work = {"copy": 2 * source.numel(), "matmul": 2 * size**3}
    times = take_turns(steps, device, reps)
    return {name: work[name] / quantiles(times[name])[0] * 1e3 for name in steps}
