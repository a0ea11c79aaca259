"""Who takes part in ``bench attention``: our operator, and others with the mask or without.

Every variant is brought into one form: q, k, v [B, S, H, D] in, out [B, S, H, D].
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.cases import Case
from bench.measure import Attend
from bench.suite import Unavailable
from sda_fast import ops

Prepare = Callable[[Case, Tensor], "Ready"]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FLASH_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute.interface"}
"""Where each version of flash-attn has its function."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A variant set up for one case.

    Attributes:
        attend: q, k, v -> out.
        mask_bytes: what it keeps on the device to know the mask, None where that is not known.
        setup_ms: time to make that, None where there is nothing to make.
    """

    attend: Attend
    mask_bytes: int | None = 0
    setup_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute a case.

    Attributes:
        name: in records and options.
        label: in tables.
        masked: it obeys the mask; the others attend to everything, a bound on the speed.
        prepare: sets it up for a case, given its q. Raises Unavailable.
        gpu: it needs one.
    """

    name: str
    label: str
    masked: bool
    prepare: Prepare
    gpu: bool = True


@lru_cache(maxsize=1)
def dense_mask(case: Case, device: torch.device) -> Tensor:
    """[1, 1, S, S] bool on the device, True = may attend: the form that FLUX is given."""
    mask = case.tree.attention_mask(case.h, case.w, case.rule, case.extra_text)
    return mask[None, None].to(device)


def _ours(implementation: str, deterministic: bool = True) -> Prepare:
    def prepare(case: Case, q: Tensor) -> Ready:
        layout = case.tree, case.h, case.w, case.rule

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.hierarchical_attention(
                q, k, v, *layout, extra_text=case.extra_text,
                implementation=implementation, deterministic=deterministic,
            )  # fmt: skip

        if q.device.type != "cuda":
            return Ready(attend, None)
        start = perf_counter()
        held = ops.mask_bytes(q, *layout, case.extra_text, implementation)
        took = _ms_since(start, q.device)
        # a later implementation finds what an earlier one has cached
        return Ready(attend, held, took if implementation == "auto" else None)

    return prepare


def prepare_sdpa(masked: bool, backend: SDPBackend | None) -> Prepare:
    """torch's attention with the dense mask or without; by one backend, or whichever it takes."""

    def prepare(case: Case, q: Tensor) -> Ready:
        mask = dense_mask(case, q.device) if masked else None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads_first = [t.transpose(1, 2) for t in (q, k, v)]
            with nullcontext() if backend is None else sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask)
            return out.transpose(1, 2)

        return Ready(attend, 0 if mask is None else mask.nbytes)

    return prepare


def mask_mod(case: Case, device: torch.device) -> MaskMod:
    """The overlap rule as FlexAttention wants it: from a few integers a token.

    Raises:
        Unavailable: the case has another rule.
    """
    if case.rule != "overlap":
        raise Unavailable(f"its BlockMask is written for the overlap rule, not for {case.rule}")
    txt, img, h, w = case.txt_len, case.h * case.w, case.h, case.w
    tree, extra = case.tree, case.extra_text
    # txt tokens have a node, image tokens a patch; entries of the other kind are never read
    pad = lambda t, before, after: F.pad(t, (before, after)).to(device, torch.int32)
    cells = pad(2**tree.token_level, 0, 0)
    cells = F.pad(cells, (0, extra), value=1)
    cells = F.pad(cells, (0, img))
    row, col = (pad(t, 0, extra + img) for t in (tree.token_row, tree.token_col))
    patch = torch.arange(img)
    y, x = pad(patch // w, txt, 0), pad(patch % w, txt, 0)

    def allowed(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        g = cells[k]
        rows = (y[q] * g < (row[k] + 1) * h) & ((y[q] + 1) * g > row[k] * h)
        cols = (x[q] * g < (col[k] + 1) * w) & ((x[q] + 1) * g > col[k] * w)
        return (q < txt) | (k >= txt) | (rows & cols)

    return allowed


def _flex(backend: str | None) -> Prepare:
    def prepare(case: Case, q: Tensor) -> Ready:
        allowed, took = mask_mod(case, q.device), 0.0
        for _ in range(2):  # the first warms up what the second is timed with
            start = perf_counter()
            block_mask = _block_mask(allowed, case.seq_len, q.device)
            took = _ms_since(start, q.device)
        options: Any = None if backend is None else {"BACKEND": backend}
        compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads_first = [t.transpose(1, 2) for t in (q, k, v)]
            out = compiled(*heads_first, block_mask=block_mask, kernel_options=options)
            return out.transpose(1, 2)

        held = [*block_mask.as_tuple(), *(c.cell_contents for c in allowed.__closure__ or ())]
        return Ready(attend, sum(t.nbytes for t in held if isinstance(t, Tensor)), took)

    return prepare


def _block_mask(allowed: MaskMod, length: int, device: torch.device) -> BlockMask:
    return create_block_mask(allowed, None, None, length, length, device=device)


def _ms_since(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (perf_counter() - start) * 1e3


def prepare_flash_attn(module: str) -> Prepare:
    """flash-attn, unmasked, from one of FLASH_MODULES; Unavailable where it is not installed."""

    def prepare(_case: Case, _q: Tensor) -> Ready:
        try:
            function = import_module(module).flash_attn_func
        except (ImportError, AttributeError, OSError) as error:
            raise Unavailable(f"{module} is not installed: {error}") from error

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = function(q, k, v)
            return out[0] if isinstance(out, tuple) else out  # versions 3 and 4 add lse

        return Ready(attend)

    return prepare


def _every_variant() -> tuple[Variant, ...]:
    # FLASH refuses a mask: it is asked all the same, so that the record says so
    backends = {
        "cudnn": ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        "efficient": ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
        "math": ("math", SDPBackend.MATH),
        "flash": ("flash", SDPBackend.FLASH_ATTENTION),
    }
    ours = [
        Variant(f"ours-{name}", f"**ours, {name}**", True, _ours(name), gpu=False)
        for name in ("auto", *ops.IMPLEMENTATIONS)
    ]
    # "split" may also take a vendor's backward whose bits differ from call to call
    ours.append(
        Variant(
            "ours-split-unordered", "ours, split, unordered", True, _ours("split", False), False
        )
    )
    masked = [
        Variant(
            f"sdpa-mask-{key}", f"SDPA {label}, bool mask", True, prepare_sdpa(True, backend), gpu
        )
        for key, (label, backend) in backends.items()
        for gpu in (key != "math",)
    ]
    unmasked = [
        Variant(
            f"sdpa-{key}", f"SDPA {label}, unmasked", False, prepare_sdpa(False, backends[key][1])
        )
        for key, label in (("cudnn", "cuDNN"), ("flash", "flash"))
    ]
    flash = [
        Variant(f"flash-attn-{n}", f"flash-attn {n}, unmasked", False, prepare_flash_attn(module))
        for n, module in FLASH_MODULES.items()
    ]
    return (
        *ours,
        Variant(
            "sdpa-mask", "SDPA as it comes, bool mask", True, prepare_sdpa(True, None), gpu=False
        ),
        *masked,
        Variant("flex", "FlexAttention, compiled", True, _flex(None)),
        Variant("flex-flash", "FlexAttention, FLASH backend", True, _flex("FLASH")),
        Variant("sdpa", "SDPA as it comes, unmasked", False, prepare_sdpa(False, None), gpu=False),
        *unmasked,
        *flash,
    )


VARIANTS = {variant.name: variant for variant in _every_variant()}
"""All, by name, in the order of the tables."""
