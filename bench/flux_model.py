"""One FLUX transformer with random weights, and what shares them without changing one another.

Whoever changes modules in place (``compile_repeated_blocks``, ``fuse_qkv_projections``, ``attach``,
an attention backend) does it to a twin: modules of its own, the same parameters.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxTransformer2DModel
from torch import Tensor

from bench.flux_cases import FluxCase
from bench.measure import quantiles, take_turns
from sda_fast.fast_flux import FastFlux
from sda_fast.hierarchy import Hierarchy
from sda_fast.shapes import random_weights

BACKENDS = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3")
"""Of diffusers, for attention without a mask: exact ones that download nothing."""
BACKEND_REPS = 5
COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": False}
"""Of ``compile_repeated_blocks``: block by block, for one shape."""
COMPILED = 64
"""Compiled forms of a block, by mask, length, strides and kind, that are kept beside one another;
torch gives up after 8, and variants take turns."""
TEXT_KEYS = 3.0
"""Mean weight of the norm of the text's keys in double blocks: random text would hardly be looked
at, and a mask that is not obeyed would not show."""


def random_transformer(
    config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Any:
    """A frozen FluxTransformer2DModel, made where it is to be; no weight is zero.

    Linears keep the size of what goes through them; norms of heads are about 1.
    """
    with torch.device("meta"):
        transformer: Any = FluxTransformer2DModel(**config)
    random_weights(transformer, dtype, device, seed)
    with torch.no_grad():
        for name, p in transformer.named_parameters():
            if "norm_added_k" in name:
                p.add_(TEXT_KEYS - 1)
    return transformer


def run_stock(transformer: Any, inputs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
    """The velocity of diffusers' own forward.

    Args:
        transformer: a FluxTransformer2DModel.
        inputs: of its forward.
        mask: [1, 1, S, S] bool, True = may attend; None for all.
    """
    joint = None if mask is None else {"attention_mask": mask}
    return transformer(**inputs, joint_attention_kwargs=joint, return_dict=False)[0]


def use_backend(transformer: Any, name: str) -> None:
    """Attend by a backend of diffusers, in this transformer alone.

    diffusers' ``set_attention_backend`` makes it that of all others, too.
    """
    for module in transformer.modules():
        if isinstance(module, FluxAttention):
            processor: Any = module.processor
            processor._attention_backend = AttentionBackendName(name)


def compile_blocks(transformer: Any) -> None:
    """Compile it as diffusers recommends, at its first call."""
    torch._dynamo.config.recompile_limit = COMPILED  # pyrefly: ignore
    transformer.compile_repeated_blocks(**COMPILE)


def rank_backends(shape: tuple[int, ...], like: Tensor) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of attention without a mask by each of BACKENDS, the fastest first.

    Args:
        shape: [B, S, H, D].
        like: of the dtype and on the device.

    Returns:
        Times, and of those that cannot run here, why.
    """
    generator = torch.Generator(like.device).manual_seed(0)
    draw = {"generator": generator, "dtype": like.dtype, "device": like.device}
    q, k, v = (torch.randn(shape, **draw) for _ in range(3))
    steps, refused = {}, {}
    for name in BACKENDS:
        backend = AttentionBackendName(name)
        step = lambda backend=backend: dispatch_attention_fn(q, k, v, backend=backend)
        try:
            with torch.no_grad():
                _check_attention_backend_requirements(backend)
                step()
            steps[name] = step
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, ValueError, TypeError, AttributeError) as error:
            refused[name] = " ".join(str(error).split())[:200]
    with torch.no_grad():
        times = take_turns(steps, like.device, BACKEND_REPS)
    medians = {name: quantiles(ms)[1] for name, ms in times.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1])), refused


class Frozen:
    """A random transformer, and our ways to run it with the same weights.

    FastFlux moves the weights that it packs, once: it is made before anything holds an address.

    Args:
        case: of the model, tree and dtype.
        device: where.
    """

    def __init__(self, case: FluxCase, device: torch.device) -> None:
        self.transformer = random_transformer(case.config, case.dtype, device)
        self.tree: Hierarchy = case.tree
        self.fast = FastFlux(self.transformer, case.tree)
        self._fp8: FastFlux | None = None

    def twin(self) -> Any:
        """A transformer of its own modules and the shared weights, to be changed at will."""
        shared: dict[int, Any] = {id(p): p for p in self.transformer.parameters()}
        return copy.deepcopy(self.transformer, shared)

    def fp8(self) -> FastFlux:
        """FastFlux with quantised linears, made once."""
        if self._fp8 is None:
            self._fp8 = FastFlux(self.transformer, self.tree, precision="fp8")
        return self._fp8


@dataclass(slots=True)
class Shelf:
    """The transformer of the case before, as the next one mostly wants the same.

    Attributes:
        about: what it was made for.
        frozen: it.
    """

    about: tuple = ()
    frozen: Frozen | None = field(default=None, repr=False)

    def get(self, case: FluxCase, device: torch.device) -> Frozen:
        """The transformer of a case; another one is dropped first."""
        about = case.model, case.tree, case.dtype, device
        if self.frozen is None or self.about != about:
            self.frozen = None  # 24 GB, not to be held beside the next
            self.frozen, self.about = Frozen(case, device), about
        return self.frozen
