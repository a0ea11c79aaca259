"""Hierarchical attention inside a stock ``FluxTransformer2DModel``, with no mask tensor.

``attach`` gives every attention layer a processor that calls the op, and puts one hook in front of
the transformer's forward. The hook reads the grid of image tokens from ``img_ids`` and sends it to
the processors in ``joint_attention_kwargs``; nothing is kept on them, because diffusers re-creates
processors as ``processor.__class__()``. Nothing in diffusers is patched.
"""

import inspect
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxTransformer2DModel,
    _get_qkv_projections,
)
from torch import Tensor

from sda_fast.hierarchy import RULES, Hierarchy
from sda_fast.ops import hierarchical_attention

HOOK = "sda_fast_hierarchy"  # its name in the transformer's HookRegistry

# the backends of diffusers that apply a dense mask as it is; the op stands in for these
MASK_BACKENDS = frozenset(
    {
        "native",
        "_native_cudnn",
        "_native_efficient",
        "_native_math",
        "_native_npu",
        "flex",
        "xformers",
    }
)


def attach(
    transformer: FluxTransformer2DModel,
    tree: Hierarchy,
    rule: str = "overlap",
    *,
    isolate_level: int | None = None,
) -> "Attachment":
    """Make a FLUX transformer attend by a hierarchy.

    The first ``tree.num_tokens`` text tokens are the embedding's positions, further ones behave as
    the root; the grid is read from ``img_ids`` at each forward, so that any size, batch and Flux
    pipeline works, Kontext (source tokens: first id 1) included. LoRA, fused projections, offload,
    gradient checkpointing and ``compile_repeated_blocks`` keep working. The transformer is changed
    in place; results equal those of ``SemanticEmbedding.flux_inputs`` with its dense mask.

    While attached the op computes the attention, whichever backend of diffusers is set; a backend
    that could not apply a mask is refused, when attaching and at each forward. So are a dense
    ``attention_mask`` beside it, context parallelism, and an IP-Adapter loaded before or after: for
    these use the dense mask of ``flux_inputs``.

    Args:
        transformer: the transformer of any stock Flux pipeline, not wrapped by ``torch.compile``.
        tree: the hierarchy of the embeddings that will be passed as ``encoder_hidden_states``.
        rule: "overlap", "local" or "isolated".
        isolate_level: for "isolated", the level whose nodes are kept apart; None is the deepest.

    Returns:
        The handle: ``detach()`` it, or use it as a context manager.

    Raises:
        TypeError: transformer is no FluxTransformer2DModel or tree no Hierarchy.
        ValueError: rule or isolate_level is unknown, the transformer is attached already, an
            IP-Adapter or another processor is on it, or its attention backend cannot mask.
        RuntimeError: the transformer is a copy of one that was attached.
    """
    # by type: FastFlux, whose attention is not the processors', says that its class is this one
    if not issubclass(type(transformer), FluxTransformer2DModel):
        raise TypeError(
            "transformer must be a diffusers FluxTransformer2DModel (attach first, compile after), "
            f"got {type(transformer).__name__}"
        )
    if not isinstance(tree, Hierarchy):
        raise TypeError(f"tree must be a Hierarchy, got {type(tree).__name__}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    isolate_level = tree.check_isolate_level(isolate_level)
    attached = HookRegistry.check_if_exists_or_initialize(transformer).get_hook(HOOK)
    if isinstance(attached, _GridHook):
        attached.refuse_second(transformer)
    layers = [m for m in transformer.modules() if isinstance(m, FluxAttention)]
    for layer in layers:
        if type(layer.processor) is not FluxAttnProcessor:
            raise ValueError(
                "transformer must carry diffusers' own FluxAttnProcessor, got "
                f"{type(layer.processor).__name__}: unload the IP-Adapter, or use the dense mask "
                "of flux_inputs"
            )
        check_processor(layer.processor)
    return Attachment(transformer, _GridHook(tree, rule, isolate_level, layers))


class Attachment:
    """A transformer that attends by a hierarchy until ``detach()``; made by ``attach``.

    Attributes:
        transformer: the FluxTransformer2DModel, changed in place.
        tree: the hierarchy.
        rule: the mask rule.
    """

    def __init__(self, transformer: FluxTransformer2DModel, hook: "_GridHook") -> None:
        self.transformer = transformer
        self.tree, self.rule = hook.tree, hook.rule
        self._attached = True
        self._original: dict[str, Any] = transformer.attn_processors
        new: dict[str, Any] = {name: HierarchicalFluxAttnProcessor() for name in self._original}
        for name, processor in self._original.items():
            _copy_settings(processor, new[name])
        transformer.set_attn_processor(new)
        with _beneath_accelerate(transformer):
            HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, HOOK)

    def detach(self) -> None:
        """Give the transformer back as it was; its outputs are bit-identical to before.

        Processors that were replaced in the meantime, and a backend that was set, stay. A second
        call does nothing.
        """
        if not self._attached:
            return
        self._attached = False
        restored: dict[str, Any] = self.transformer.attn_processors
        for name, processor in restored.items():
            if isinstance(processor, HierarchicalFluxAttnProcessor):
                restored[name] = self._original[name]
                _copy_settings(processor, restored[name])
        self.transformer.set_attn_processor(restored)
        with _beneath_accelerate(self.transformer):
            registry = HookRegistry.check_if_exists_or_initialize(self.transformer)
            registry.remove_hook(HOOK, recurse=False)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


class HierarchicalFluxAttnProcessor(FluxAttnProcessor):
    """FLUX attention through ``sda_fast.ops.hierarchical_attention``; holds no state of its own.

    ``hierarchical_attention`` arrives with ``joint_attention_kwargs``: a function of q, k and v,
    each [B, S, H, D] with text first, that returns [B, S, H, D].
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        hierarchical_attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As FluxAttnProcessor: [B, S_img, C] and [B, S_txt, C] in double blocks, else [B, S, C].

        Raises:
            RuntimeError: no hook of ``attach`` ran before, so that the layout is unknown.
        """
        if hierarchical_attention is None:
            raise RuntimeError(
                "the hook of sda_fast.attach did not run: call the transformer, not a block of it; "
                "if its forward was replaced or its hooks removed, detach() and attach again"
            )
        projections: Any = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        q, k, v, *added = projections
        q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in (q, k, v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            txt_q, txt_k, txt_v = (t.unflatten(-1, (-1, attn.head_dim)) for t in added)
            txt_q, txt_k = attn.norm_added_q(txt_q), attn.norm_added_k(txt_k)
            q, k, v = (torch.cat(pair, dim=1) for pair in ((txt_q, q), (txt_k, k), (txt_v, v)))
        if image_rotary_emb is not None:
            q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
            k = apply_rotary_emb(k, image_rotary_emb, sequence_dim=1)

        out = hierarchical_attention(q, k, v).flatten(2, 3).to(q.dtype)
        if encoder_hidden_states is None:
            return out
        num_txt = encoder_hidden_states.shape[1]
        txt, img = out[:, :num_txt], out[:, num_txt:]
        img = attn.to_out[1](attn.to_out[0](img.contiguous()))
        return img, attn.to_add_out(txt.contiguous())


class _GridHook(ModelHook):
    """Reads the layout of each forward and hands it to the processors."""

    def __init__(
        self, tree: Hierarchy, rule: str, isolate_level: int, layers: list[FluxAttention]
    ) -> None:
        super().__init__()
        self.tree, self.rule, self.isolate_level, self.layers = tree, rule, isolate_level, layers
        self.owner: weakref.ref[torch.nn.Module] | None = None
        # the ids read last, their version, and their grids: reading waits for the device
        self._last: tuple[weakref.ref[Tensor], int, list[tuple[int, int]]] | None = None

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Remember whose hook this is: a copy of the transformer carries it too."""
        self.owner = weakref.ref(module)
        return module

    def refuse_second(self, module: torch.nn.Module) -> None:
        """Say why a transformer that carries this hook cannot be attached."""
        self.check_owner(module)
        about = f"to {self.tree} by {self.rule!r}: detach() that handle first"
        raise ValueError(f"transformer is attached already, {about}")

    def check_owner(self, module: torch.nn.Module) -> None:
        """Refuse a copy, whose forward would run the weights of the transformer it came from."""
        if self.owner is None or self.owner() is not module:
            raise RuntimeError(
                "transformer is a copy of one that sda_fast.attach had changed, and would run its "
                "weights: copy before attach, then attach to the copy"
            )

    @torch.compiler.disable
    def pre_forward(
        self, module: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Check what cannot be masked and add the attention of this layout to the arguments."""
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs.update(zip(names, args, strict=False))
        self.check_owner(module)
        self._check_layers()
        if kwargs.get("img_ids") is None:
            raise ValueError(
                "img_ids must be given while the transformer is attached: they tell the grid of "
                "the image tokens, [S_img, 3]; got None"
            )
        given = kwargs.get("joint_attention_kwargs") or {}
        if given.get("attention_mask") is not None:
            raise ValueError(
                "joint_attention_kwargs must not hold an attention_mask while the transformer is "
                "attached: pass the embedding alone, or detach() first"
            )
        num_txt = kwargs["encoder_hidden_states"].shape[1]
        if num_txt < self.tree.num_tokens:
            raise ValueError(
                f"encoder_hidden_states must hold the {self.tree.num_tokens} positions of "
                f"{self.tree} first, got {num_txt} text tokens"
            )
        (h, w), *source = self._grids(kwargs["img_ids"])
        attention = partial(
            hierarchical_attention,
            tree=self.tree,
            h=h,
            w=w,
            rule=self.rule,
            extra_text=num_txt - self.tree.num_tokens,
            isolate_level=self.isolate_level,
            source=source[0] if source else None,
        )
        kwargs["joint_attention_kwargs"] = {**given, "hierarchical_attention": attention}
        return (), kwargs

    def _check_layers(self) -> None:
        """Refuse a layer whose processor would ignore the hierarchy."""
        for layer in self.layers:
            if not isinstance(layer.processor, HierarchicalFluxAttnProcessor):
                raise RuntimeError(
                    f"an attention processor was replaced by {type(layer.processor).__name__} "
                    "after sda_fast.attach and would drop the mask: unload the IP-Adapter, then "
                    "detach() and attach again, or use the dense mask of flux_inputs"
                )
            check_processor(layer.processor)

    def _grids(self, img_ids: Tensor) -> list[tuple[int, int]]:
        """``read_grids``, remembered while the very same tensor comes again."""
        # tensors of inference mode count no versions, so that a change would go unseen
        version = -1 if img_ids.is_inference() else img_ids._version
        if self._last is not None:
            last, last_version, grids = self._last
            if last() is img_ids and last_version == version >= 0:
                return grids
        grids = read_grids(img_ids)
        self._last = (weakref.ref(img_ids), version, grids)
        return grids


def read_grids(img_ids: Tensor) -> list[tuple[int, int]]:
    """(rows, columns) of the image tokens and, for Kontext, of the source picture's tokens.

    Args:
        img_ids: [S_img, 3] of any dtype, or [1, S_img, 3]: 0 for the image and 1 for the source,
            row, column; each grid in raster order, the image first. Ids rounded by a short
            dtype (bfloat16 above 256) are read right.

    Raises:
        ValueError: the ids are no such grids.
    """
    ids = img_ids.detach().double().cpu()
    ids = ids[0] if ids.ndim == 3 else ids
    of_source = ids[:, 0]
    num_img = int((of_source == 0).sum())
    parts = [part for part in (ids[:num_img], ids[num_img:]) if len(part)]
    expected = torch.arange(len(ids)) >= num_img
    if not (num_img and torch.equal(of_source, expected.double())):
        raise ValueError(
            "img_ids must begin with 0 for each token of the image, then 1 for each of one source "
            f"picture, got {of_source.unique_consecutive().tolist()} in this order"
        )
    return [_read_grid(part) for part in parts]


def _read_grid(ids: Tensor) -> tuple[int, int]:
    """(rows, columns) of [T, 3] ids in raster order."""
    # only ids equal to the first are counted: neighbours may be rounded to one value further on
    h, w = (int((ids[:, axis] == ids[0, axis]).sum()) for axis in (2, 1))
    if h * w == len(ids):
        row, col = ids[:, 1].view(h, w), ids[:, 2].view(h, w)
        rising = (row[:, 0].diff() >= 0).all() and (col[0].diff() >= 0).all()
        if rising and (row == row[:, :1]).all() and (col == col[:1]).all():
            return h, w
    raise ValueError(
        f"img_ids must be one grid of rows and columns in raster order, got {len(ids)} tokens with "
        f"{h} in the first column and {w} in the first row"
    )


def check_processor(
    processor: FluxAttnProcessor, remedy: str = "call transformer.reset_attention_backend()"
) -> None:
    """Refuse settings under which diffusers would drop a mask or split the sequence.

    Args:
        processor: of one attention layer.
        remedy: what the message of a wrong backend advises.

    Raises:
        ValueError: its backend cannot mask, or context parallelism is on.
    """
    if processor._parallel_config is not None:
        raise ValueError("hierarchical attention cannot run under context parallelism: disable it")
    check_backend(processor._attention_backend, remedy)


def check_backend(backend: Any, remedy: str) -> None:
    """Refuse an attention backend of diffusers that would drop a mask; None is no backend.

    Raises:
        ValueError: it would, or diffusers knows none of that name.
    """
    name = getattr(backend, "value", backend)
    if name is None or name in MASK_BACKENDS:
        return
    known = {member.value for member in AttentionBackendName}
    if name not in known:
        reason = f"is unknown to diffusers, which has {', '.join(sorted(known))}"
    elif "varlen" in name:
        reason = "would reduce the mask to key padding"
    else:
        reason = "takes no mask"
    raise ValueError(f"attention backend {name!r} {reason}: {remedy}")


def _copy_settings(source: Any, target: Any) -> None:
    """Carry over what diffusers keeps on a processor."""
    target._attention_backend = source._attention_backend
    target._parallel_config = source._parallel_config


@contextmanager
def _beneath_accelerate(module: torch.nn.Module) -> Generator[None, None, None]:
    """Expose the forward that accelerate's offload wraps, and put the wrapper back around it.

    Model offload takes its wrapper off and on again at the end of every pipeline call; a hook
    around the wrapper would be lost there.
    """
    slots = vars(module)
    wrapped = "_old_forward" in slots
    if wrapped:
        slots["forward"], slots["_old_forward"] = slots["_old_forward"], slots["forward"]
    try:
        yield
    finally:
        if wrapped:
            slots["forward"], slots["_old_forward"] = slots["_old_forward"], slots["forward"]
