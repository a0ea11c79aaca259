"""The gate's own process: ``python -m bench.gate_worker`` prints what it compiled, as JSON."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.gate import Built
from csrc_triton.joint_attention import launch_joint_attention
from csrc_triton.joint_attention_backward import (
    launch_joint_attention_dkdv,
    launch_joint_attention_dq,
)
from csrc_triton.modulation import launch_ada_norm, launch_ada_norm_backward
from csrc_triton.norm_rope import launch_norm_rope, launch_norm_rope_backward
from csrc_triton.quantise import launch_quantise_rows
from csrc_triton.rope3d import Transform, padded_width
from csrc_triton.rope3d_attention import launch_rope3d_attention
from csrc_triton.rope3d_attention_backward import launch_rope3d_dkdv, launch_rope3d_dq
from csrc_triton.tiles import (
    DTYPES,
    HEAD_DIMS,
    IMPLEMENTATIONS,
    KERNELS,
    NORM_ROPE_KERNELS,
    ROPE3D_KERNELS,
    Problem,
    RowTile,
    Tile,
    choose_row_tile,
    choose_tile,
)
from sda_fast.hierarchy import Hierarchy
from sda_fast.ops.joint_lists import Layout, key_lists, query_lists

SHARED_LIMIT = 232_448
"""Bytes of shared memory that a program may ask for on sm_90; the compiler does not refuse more."""
META = torch.device("meta")
Launch = Callable[[], object]
BATCH, HEADS = 1, 24
TREE = Hierarchy((32, 8, 4))
# (rows, columns, rule): nothing masked but txt, a ragged end, masked image blocks too
LAYOUTS = ((64, 64, "overlap"), (45, 80, "overlap"), (45, 80, "local"))


class Target:
    """A driver that answers what the compiler asks, for a Hopper GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        """sm_90, which Triton compiles as sm_90a."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """None is needed: nothing is launched."""
        return 0

    def set_current_device(self, device: int) -> None:
        """Nothing to do."""

    def get_active_torch_device(self) -> torch.device:
        """Where tensors have no memory."""
        return META


def main() -> None:
    """Compile each kernel for each dtype and D, and print it all."""
    triton.runtime.driver.set_active(Target())
    triton.knobs.nvidia.dump_ptxas_log = True
    built: dict[str, Built] = {}
    attention = _joint_attention, _rope3d_attention
    memory_bound = _modulation, _norm_rope, _quantise
    for words, launch, tensor_cores in chain(*(kernels() for kernels in attention + memory_bound)):
        for number, (compiled, log) in enumerate(_compile(launch)):
            # a second kernel of one launcher merges what the first one left in parts
            name, products = (f"merge after {words}", False) if number else (words, tensor_cores)
            built[name] = _examine(name, compiled, log, products)
    answer = {"triton": triton.__version__, "built": [asdict(one) for one in built.values()]}
    print(json.dumps(answer))


def _joint_attention() -> Iterator[tuple[str, Launch, bool]]:
    """FLUX's D = 128 with everything, every other D and dtype with the fullest kernels."""
    layouts = [
        Layout(TREE.tokens_per_node, h, w, rule, 0, TREE.num_levels - 1, ())
        for h, w, rule in LAYOUTS
    ]
    cases = [(torch.bfloat16, 128, how, layout) for how in IMPLEMENTATIONS for layout in layouts]
    cases += [(torch.bfloat16, head_dim, "fused", layouts[1]) for head_dim in HEAD_DIMS[:-1]]
    cases += [(dtype, 128, "fused", layouts[1]) for dtype in DTYPES[1:]]
    for dtype, head_dim, implementation, layout in cases:
        for kernel in KERNELS:
            yield _joint_launch(kernel, implementation, layout, dtype, head_dim)


def _joint_launch(
    kernel: str, implementation: str, layout: Layout, dtype: torch.dtype, head_dim: int
) -> tuple[str, Launch, bool]:
    """One kernel as the operator would launch it."""
    split = implementation == "split"
    problem = Problem(dtype, head_dim, layout.num_txt, layout.num_img, BATCH * HEADS)
    tile = choose_tile(kernel, implementation, problem)
    lists = (key_lists if kernel == "dkdv" else query_lists)(layout, tile, split, META)
    q = torch.empty(BATCH, layout.length, HEADS, head_dim, dtype=dtype, device=META)
    lse = torch.empty(BATCH, HEADS, layout.length, device=META)
    first, num_txt = layout.dense_from or 0, layout.num_txt
    if kernel == "forward":
        partial = (q[:, first:], lse[..., first:], first) if split else None
        launch = lambda: launch_joint_attention(q, q, q, q, 0.1, lists, tile, partial)
    elif kernel == "dq":
        partial = (q[:, first:], first) if split else None
        launch = lambda: launch_joint_attention_dq(
            q, (q, q, q), q, lse, 0.1, lists, tile, partial
        )  # fmt: skip
    else:
        partial = (q[:, num_txt:], q[:, num_txt:], num_txt) if split else None
        launch = lambda: launch_joint_attention_dkdv(
            q, (q, q, q), lse, lse, 0.1, lists, tile, partial
        )  # fmt: skip
    parts = [name for name in ("blocks", "dense") if getattr(lists, f"has_{name}")]
    words = [kernel, implementation, f"D{head_dim}", str(dtype)[6:], _words(tile), *parts]
    return " ".join(words), launch, dtype != torch.float32


def _rope3d_attention() -> Iterator[tuple[str, Launch, bool]]:
    """The adapter's D = 64 with and without rotation and norm, other D and dtypes with both."""
    both = ("rotated", "normed")
    for dtype, head_dim, transform in (
        (torch.bfloat16, 64, both),
        (torch.bfloat16, 64, ("rotated",)),
        (torch.bfloat16, 64, ("normed",)),
        (torch.bfloat16, 64, ()),
        *((torch.bfloat16, head_dim, both) for head_dim in (32, 80, 128)),
        *((dtype, 64, both) for dtype in DTYPES[1:]),
        *((torch.float32, head_dim, both) for head_dim in (80, 128)),
    ):
        for kernel in ROPE3D_KERNELS:
            yield _rope3d_launch(kernel, dtype, head_dim, transform)


def _rope3d_launch(
    kernel: str, dtype: torch.dtype, head_dim: int, transform: Sequence[str]
) -> tuple[str, Launch, bool]:
    """One kernel on 128 queries and 1369 padded keys."""
    queries, keys, parts = 128, 1369, 8
    problem = Problem(dtype, padded_width(head_dim), queries, keys, BATCH * HEADS)
    tile = choose_tile(kernel, "", problem)
    q, k = (
        torch.empty(BATCH, length, HEADS, head_dim, dtype=dtype, device=META)
        for length in (queries, keys)
    )
    lse = torch.empty(BATCH, HEADS, queries, device=META)
    turns = (torch.empty(keys, 3, device=META), lse) if "rotated" in transform else (None, None)
    weight = torch.empty(head_dim, dtype=dtype, device=META) if "normed" in transform else None
    same = Transform(*turns, weight)
    rest = (same, same), torch.empty(1, dtype=torch.int32, device=META)
    if kernel == "rope3d_forward":
        launch = lambda: launch_rope3d_attention(q, k, k, *rest, 0.1, parts, tile)
    elif kernel == "rope3d_dq":
        launch = lambda: launch_rope3d_dq(q, (q, k, k), (q, lse), *rest, 0.1, parts, tile)
    else:
        launch = lambda: launch_rope3d_dkdv(q, (q, k, k), lse, lse, *rest, 0.1, tile)
    words = [kernel, f"D{head_dim}", str(dtype)[6:], _words(tile), *(transform or ["plain"])]
    return " ".join(words), launch, dtype != torch.float32


def _modulation() -> Iterator[tuple[str, Launch, bool]]:
    """FLUX's C = 3072 with every pass, other C and dtypes with the fullest."""
    cases = [(torch.bfloat16, channels) for channels in (3072, 3000, 8192, 512)]
    for dtype, channels in (*cases, *((dtype, 3072) for dtype in DTYPES[1:])):
        x = torch.empty(BATCH, 4224, channels, dtype=dtype, device=META)
        row = torch.empty(BATCH, 6 * channels, dtype=dtype, device=META)[:, :channels]
        stats = torch.empty(BATCH, 4224, 2, device=META)
        words = f"C{channels} {str(dtype)[6:]}"
        plain = (dtype, channels) == cases[0]
        for gated in (False, True) if plain else (True,):
            name = ("gated_" if gated else "") + "ada_norm"
            residual = (x, row) if gated else None
            launch = partial(launch_ada_norm, x, row, row, 1e-6, residual)
            yield f"{name} {words}", launch, False
            for learns in (False, True) if plain else (True,):
                wanted = (gated and learns, learns, learns)
                residual = (x, row, x if learns else None) if gated else None
                launch = partial(launch_ada_norm_backward, x, x, stats, row, wanted, residual)
                yield f"{name}_backward {words}{' learns' * learns}", launch, False


def _norm_rope() -> Iterator[tuple[str, Launch, bool]]:
    """FLUX's D = 128: both streams, and one with and without v; other D and dtypes with both."""
    cases = [(torch.bfloat16, head_dim, 2, True) for head_dim in HEAD_DIMS]
    cases += [(torch.bfloat16, 128, 1, True), (torch.bfloat16, 128, 1, False)]
    cases += [(dtype, 128, 2, True) for dtype in DTYPES[1:]]
    for dtype, head_dim, count, values in cases:
        empty = partial(torch.empty, dtype=dtype, device=META)
        lengths, width = (128, 4096)[-count:], HEADS * head_dim
        # single blocks slice them from a projection that is fused with the MLP's
        streams = [empty(BATCH, n, 7 * width)[..., : (2 + values) * width] for n in lengths]
        norms = [empty(head_dim) for _ in range(2 * count)]
        tables = (torch.empty(sum(lengths), head_dim, device=META),) * 2
        grads = [empty(BATCH, sum(lengths), HEADS, head_dim) for _ in range(2 + values)]
        forward, backward = (choose_row_tile(name, dtype, head_dim) for name in NORM_ROPE_KERNELS)
        kind = ("one stream", "two streams")[count - 1] + (" with v" if values else "")
        words = f"D{head_dim} {str(dtype)[6:]} {kind}"
        launch = partial(launch_norm_rope, streams, norms, tables, HEADS, values, forward)
        yield f"{NORM_ROPE_KERNELS[0]} {words} {_row_words(forward)}", launch, False
        for learn in (False, True):
            launch = partial(
                launch_norm_rope_backward, grads, streams, norms, tables, learn, backward
            )
            about = f"{words} {_row_words(backward)}{' with norms' if learn else ''}"
            yield f"{NORM_ROPE_KERNELS[1]} {about}", launch, False


def _quantise() -> Iterator[tuple[str, Launch, bool]]:
    """FLUX's rows: tokens of every width, and gradients, which the scales of a weight multiply."""
    half = torch.bfloat16
    cases = [(half, width, False) for width in (64, 3072, 12288, 15360)]
    cases += [(half, width, True) for width in (3072, 9216, 21504)]
    cases += [(dtype, width, True) for dtype in DTYPES[1:] for width in (3072, 21504)]
    for dtype, width, scaled in cases:
        x = torch.empty(BATCH, 4224, width, dtype=dtype, device=META)
        factor = torch.empty(width, device=META) if scaled else None
        words = f"quantise_rows K{width} {str(dtype)[6:]}{' scaled' * scaled}"
        yield words, partial(launch_quantise_rows, x, factor), False


def _row_words(tile: RowTile) -> str:
    return f"{tile.tokens}x{tile.heads} w{tile.num_warps}"


def _words(tile: Tile) -> str:
    sizes = f"{tile.block_m}x{tile.block_n}/{tile.block_masked}"
    return f"{sizes} w{tile.num_warps} s{tile.num_stages}"


def _compile(launch: Launch) -> list[tuple[Any, str]]:
    """The compiled kernels of a launch, each with what ptxas said of all of them."""
    found: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        found.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return found[-1]

    JITFunction.run = compile_only
    try:
        with _standard_output() as log:
            launch()
            sys.stdout.flush()
            log.seek(0)
            text = log.read()
    finally:
        JITFunction.run = run
    return [(compiled, text) for compiled in found]


@contextmanager
def _standard_output() -> Iterator[Any]:
    """A file that takes what is written to descriptor 1, where Triton prints the log of ptxas."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield file
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)


def _examine(name: str, compiled: Any, log: str, tensor_cores: bool) -> Built:
    """Read resources and instructions, and list what breaks a promise."""
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    ptx = compiled.asm["ptx"]
    count = lambda *names: sum(len(re.findall(rf"\b{name}\b", code)) for name in names)
    [registers] = re.findall(r"REG:(\d+)", usage)
    spills, hgmma, hmma = count("STL", "LDL"), count("HGMMA"), count("HMMA")
    shared = compiled.metadata.shared
    atomics = len(re.findall(r"^\s+(?:@\S+ )?(?:atom|red)\.", ptx, re.M))
    faults = {
        "not compiled for sm_90a": not re.search(r"\.target sm_90a", ptx),
        "no HGMMA": tensor_cores and not hgmma,
        f"{hmma} HMMA": hmma,
        f"{spills} spills": spills,
        f"{shared} bytes of shared memory, the limit is {SHARED_LIMIT}": shared > SHARED_LIMIT,
        f"{atomics} atomics": atomics,
        "tf32 that nobody asked for": ".tf32" in ptx,
        f"ptxas: {''.join(re.findall(r'C75[0-9]+', log))}": re.search(r"\(C75\d+\)", log),
    }
    broken = [fault for fault, holds in faults.items() if holds]
    lines = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M))
    return Built(name, int(registers), spills, shared, hgmma, hmma, lines, broken)


def _output(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
