"""A frozen FLUX transformer, run from fused operators: same weights, same outputs, fewer passes."""

import copy
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from sda_fast.cuda_graphs import GraphCache
from sda_fast.embedding import SemanticEmbedding
from sda_fast.fast_blocks import DoubleBlock, Rotary, SingleBlock, Stream
from sda_fast.fast_checkpoints import POLICIES, Checkpoint
from sda_fast.fast_checks import check_call, check_model, check_now, refuse_controlnet
from sda_fast.fast_memory import advised, forward_bytes, kept_bytes, room_for
from sda_fast.flux_layout import Layout, LayoutMemory
from sda_fast.flux_modulation import Modulation, modulation_linears, modulation_rows, rows_of
from sda_fast.flux_stand_in import StandIn
from sda_fast.hierarchy import RULES, Hierarchy
from sda_fast.ops import ada_norm
from sda_fast.packed_linear import PackedLinear


class FastFlux(StandIn):
    """Stands in for a FluxTransformer2DModel whose text tokens are the positions of a hierarchy.

    Takes what the transformer's own ``forward`` takes and gives what that would give with the dense
    mask, up to rounding; everything else (``config``, ``dtype``, LoRA loaders, ``save_pretrained``,
    the state dict ...) is the transformer's, and to diffusers, which tells models by their class,
    so is the class. So it can be put in its place: ``pipe.transformer = FastFlux(...)``.
    The weights are the transformer's: linears with one input share one memory from now on, of which
    each keeps a view. LoRA layers are called as they are; differentiable in latents and embedding.

    Args:
        transformer: of any stock Flux pipeline, on one device.
        tree: the hierarchy of the embeddings that will be passed as ``encoder_hidden_states``;
            further text tokens behave as its root.
        rule: "overlap", "local" or "isolated".
        isolate_level: for "isolated", the level whose nodes are kept apart; None is the deepest.
        precision: None multiplies in the dtype of the weights. "fp8" quantises the linears of the
            blocks once, to e4m3 with a scale for each row, and their inputs at each call: lossy,
            for gradients too; the weights stay beside the quantised ones. LoRA layers and trained
            weights are not quantised. See ``pack``.
        graph: run as a CUDA graph, one for each layout and batch, captured at its first call; the
            last 8 are kept. Weights and LoRA scales that change are seen. Without gradients only.

    Raises:
        TypeError: transformer is no FluxTransformer2DModel or tree no Hierarchy.
        ValueError: rule, isolate_level or precision is unknown, or the transformer carries what
            this cannot run: an IP-Adapter, hooks of offload or of a cache, dropout, another norm.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        tree: Hierarchy,
        rule: str = "overlap",
        *,
        isolate_level: int | None = None,
        precision: str | None = None,
        graph: bool = False,
    ) -> None:
        check_model(transformer)
        super().__init__(transformer)
        if not isinstance(tree, Hierarchy):
            raise TypeError(f"tree must be a Hierarchy, got {type(tree).__name__}")
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if precision not in (None, "fp8"):
            raise ValueError(f"precision must be None or 'fp8', got {precision!r}")
        self.tree, self.rule, self.graph, self.precision = tree, rule, graph, precision
        self.isolate_level = tree.check_isolate_level(isolate_level)
        model, fp8 = self.transformer, precision == "fp8"
        self._double = [DoubleBlock(block, fp8) for block in model.transformer_blocks]
        self._single = [SingleBlock(block, fp8) for block in model.single_transformer_blocks]
        self._layouts = LayoutMemory(self.transformer.pos_embed)
        self._graphs = GraphCache()
        self.pack()

    def __deepcopy__(self, memo: dict) -> "FastFlux":
        # blocks and graphs are of this transformer: those of the copy are made anew
        return FastFlux(
            copy.deepcopy(self.transformer, memo),
            self.tree,
            self.rule,
            isolate_level=self.isolate_level,
            precision=self.precision,
            graph=self.graph,
        )

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As the transformer's; fp8 is quantised anew."""
        self.transformer.fuse_lora(*args, **kwargs)
        self.pack()

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As the transformer's; fp8 is quantised anew."""
        self.transformer.unfuse_lora(*args, **kwargs)
        self.pack()

    def unload_lora(self) -> None:
        """As the transformer's; fp8 is quantised anew."""
        self.transformer.unload_lora()
        self.pack()

    def pack(self) -> None:
        """Put weights that are used together side by side, or quantise them anew.

        Calls do it where they see that it is due. What they cannot see is a write through ``.data``
        under "fp8", as LoRA's fusing is when it is done on the transformer and not on this.
        """
        room = "those of a layer again" if self.precision is None else "half as much again"
        with torch.no_grad(), advised("packing weights", lambda: f"beside them it takes {room}"):
            for product in self._products():
                product.pack(anew=True)

    def _products(self) -> list[PackedLinear]:
        return [product for block in (*self._double, *self._single) for product in block.products]

    # the signature of the transformer that this stands in for
    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        controlnet_single_block_samples: Any = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity of packed latents, as ``FluxTransformer2DModel.forward``.

        Args:
            hidden_states: [B, S_img, in_channels].
            encoder_hidden_states: [B, N + extra, joint_attention_dim], positions first.
            pooled_projections: [B, P].
            timestep: [B] in [0, 1].
            img_ids: [S_img, 3]: 0 (1 for a source picture of Kontext), row, column.
            txt_ids: [N + extra, 3].
            guidance: [B], for a transformer with guidance embeddings.
            joint_attention_kwargs: ``scale`` of LoRA layers, or nothing.
            controlnet_block_samples: None; no ControlNet is run.
            controlnet_single_block_samples: likewise.
            return_dict: False gives a tuple.
            controlnet_blocks_repeat: without effect.

        Raises:
            ValueError: something is missing, does not fit, or is not supported.
        """
        given: Any = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "timestep": timestep,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
        }
        check_call(self.transformer, self.tree, given, guidance, joint_attention_kwargs)
        refuse_controlnet(controlnet_block_samples, controlnet_single_block_samples)
        check_now(self.transformer)
        layout = self._layouts.read(given["img_ids"], given["txt_ids"], self.tree)
        times = given["timestep"], given["pooled_projections"], guidance
        rows = modulation_rows(self.transformer, *times).expand(len(hidden_states), -1, -1)
        sample = self._run(hidden_states, given["encoder_hidden_states"], rows, layout)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def modulation(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """Every shift, scale and gate of N forwards at once: each of these weights is read once.

        Args:
            timestep: [N] in [0, 1]: of the steps of a picture, of samples, or of both.
            pooled: [N, P].
            guidance: [N], for a transformer with guidance embeddings, else None.

        Returns:
            [N, R, C], for ``denoise``.
        """
        each = rows_of(self.transformer) * self.transformer.inner_dim * self.dtype.itemsize / 2**20
        advice = f"fewer steps or pictures at once; each takes {each:.1f} MiB, and their sum twice"
        with (
            torch.no_grad(),
            advised(f"the modulation of {len(timestep)} forwards", lambda: advice),
        ):
            return modulation_rows(self.transformer, timestep, pooled, guidance)

    def offload_modulation(self) -> None:
        """Move the weights that make modulation, 6.46 GB of FLUX.1-dev in bf16, to the CPU.

        Rows that are there stay good. New ones fetch the weights layer by layer, each time anew:
        for those who serve with one pooled vector and one number of steps. ``.to(device)`` brings
        all of them back.
        """
        for linear in modulation_linears(self.transformer):
            for parameter in linear.parameters():
                away = parameter.data.cpu()
                parameter.data = away.pin_memory() if torch.cuda.is_available() else away

    def layout_of_ids(self, img_ids: Tensor, txt_ids: Tensor) -> Layout:
        """Where tokens are that have such ids; to read new ones waits for the device."""
        return self._layouts.read(img_ids, txt_ids, self.tree)

    def layout_of_grid(
        self, latents: Tensor, positions: Tensor, grid: tuple[int, int] | None = None
    ) -> Layout:
        """Where the tokens of a picture are, text first, without ids.

        Args:
            latents: [B, S_img, in_channels].
            positions: [B, N + extra, joint_attention_dim].
            grid: (rows, columns) of image tokens; None for a square.
        """
        return self._layouts.of_grid(latents, self.tree, grid, positions.shape[1])

    def denoise(
        self, latents: Tensor, positions: Tensor, modulation: Tensor, layout: Layout
    ) -> Tensor:
        """The velocity of one step whose modulation was made ahead of time.

        Args:
            latents: [B, S_img, in_channels].
            positions: [B, N + extra, joint_attention_dim].
            modulation: [B, R, C], rows of ``modulation``.
            layout: of ``layout_of_ids`` or ``layout_of_grid``.

        Returns:
            [B, S_img, in_channels].

        Raises:
            ValueError: the modulation is another transformer's, or see ``forward``.
        """
        check_now(self.transformer)
        count = rows_of(self.transformer)
        if modulation.shape != (len(latents), count, self.transformer.inner_dim):
            wanted = [len(latents), count, self.transformer.inner_dim]
            raise ValueError(f"modulation must be {wanted}, got {list(modulation.shape)}")
        return self._run(latents, positions, modulation, layout)

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        emb: SemanticEmbedding,
        *,
        grid: tuple[int, int] | None = None,
        guidance: float = 3.5,
        checkpoint: str = "none",
    ) -> Tensor:
        """The velocity for training: differentiable in the embedding, and in x_t if it asks.

        No graph; nothing is kept for the gradient of frozen weights.

        Args:
            x_t: [B, S_img, in_channels], packed latents at time t.
            t: [B] in [0, 1].
            emb: B embeddings with a pooled vector, of the hierarchy or of its first levels.
            grid: (rows, columns) of image tokens; None for a square.
            guidance: scale of the distilled guidance, without effect on a transformer that has
                none.
            checkpoint: what a block keeps for the backward: "none" recomputes nothing,
                "attention-out" all but the attention, "full" everything.

        Returns:
            [B, S_img, in_channels].

        Raises:
            ValueError: grid or checkpoint does not fit, or emb has no pooled vector.
        """
        if not isinstance(emb, SemanticEmbedding):
            raise TypeError(f"emb must be a SemanticEmbedding, got {type(emb).__name__}")
        if t.shape != (len(emb),) or len(x_t) != len(emb):
            found = f"{list(t.shape)} and {list(x_t.shape)}"
            raise ValueError(f"t must be [{len(emb)}] and x_t [{len(emb)}, S_img, C], got {found}")
        if checkpoint not in POLICIES:
            raise ValueError(f"checkpoint must be one of {', '.join(POLICIES)}, got {checkpoint!r}")
        layout = self._layouts.of_grid(x_t, emb.tree, grid)
        levels = emb.tree.tokens_per_node
        if levels != self.tree.tokens_per_node[: len(levels)]:
            raise ValueError(
                f"emb must have the hierarchy {self.tree} or its first levels, got {emb.tree}"
            )
        if emb.pooled is None:
            raise ValueError("emb must have a pooled vector, got None")
        dtype = self.transformer.dtype
        check_now(self.transformer)
        scale = torch.full_like(t, guidance) if self.transformer.config.guidance_embeds else None
        rows = modulation_rows(self.transformer, t, emb.pooled.to(dtype), scale)
        tokens = x_t.shape[1] + emb.tree.num_tokens
        each = kept_bytes(self.transformer, tokens, checkpoint)
        with self._told("the forward of a training step", len(x_t), tokens, each):
            return self._from_rows(
                x_t.to(dtype), emb.tokens.to(dtype), *layout.rotary, rows,
                layout=layout, keep=self._checkpoint(checkpoint), tree=emb.tree,
            )  # fmt: skip

    def _run(self, latents: Tensor, positions: Tensor, rows: Tensor, layout: Layout) -> Tensor:
        """The velocity, by a graph if that is wanted."""
        function = partial(self._from_rows, layout=layout)
        inputs = latents, positions, *layout.rotary, rows
        batch, tokens = len(latents), latents.shape[1] + positions.shape[1]
        each = forward_bytes(self.transformer, tokens)
        with self._told("a forward", batch, tokens, each):
            if self.graph:
                return self._by_graph(function, inputs, layout)
            recompute = self.transformer.gradient_checkpointing
            return function(*inputs, keep=self._checkpoint("full" if recompute else "none"))

    def _told(self, what: str, batch: int, tokens: int, each: int) -> AbstractContextManager[None]:
        about = f"{what} for {batch} pictures of {tokens} tokens each"
        return advised(about, lambda: room_for(self.transformer, each))

    def _checkpoint(self, policy: str) -> Checkpoint:
        drops = [m for m in self.transformer.modules() if isinstance(m, nn.Dropout)]
        return Checkpoint(policy, draws=any(m.training and m.p > 0 for m in drops))

    def _by_graph(
        self, function: "partial[Tensor]", inputs: tuple[Tensor, ...], layout: Layout
    ) -> Tensor:
        read = self._read()
        if torch.is_grad_enabled():
            weights = [p for module in read for p in module.parameters()]
            if any(t.requires_grad for t in (*inputs, *weights)):
                raise ValueError(
                    "graph=True gives no gradients, but an input or a weight requires one: use "
                    "velocity(), or torch.no_grad()"
                )
        products = self._products()
        for product in products:
            product.pack()  # now, so that a graph remembers the addresses that it reads
        quantised = sum(product.generation for product in products)
        about = layout.key, self.tree, self.rule, self.isolate_level, quantised
        return self._graphs.run(function, inputs, read, about)

    def _read(self) -> list[nn.Module]:
        """The modules whose weights ``_from_rows`` reads: all but those of the modulation."""
        model = self.transformer
        found = [model.x_embedder, model.context_embedder, model.proj_out]
        for block in model.transformer_blocks:
            found += [block.attn, block.ff, block.ff_context]
        for block in model.single_transformer_blocks:
            found += [block.attn, block.proj_mlp, block.proj_out]
        return found

    def _from_rows(
        self,
        latents: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Tensor,
        *,
        layout: Layout,
        keep: Checkpoint | None = None,
        tree: Hierarchy | None = None,
    ) -> Tensor:
        model, keep = self.transformer, keep or Checkpoint("none")
        modulation = Modulation(rows.unbind(1), len(self._double), len(self._single))
        tree = tree or self.tree
        deepest = min(self.isolate_level, tree.num_levels - 1)
        attend = layout.attention(tree, self.rule, deepest)
        rotary: Rotary = (cos, sin)
        img, txt = model.x_embedder(latents), model.context_embedder(positions)
        img, txt = (
            (x, ada_norm(x, shift, scale))
            for x, (shift, scale, *_) in zip((img, txt), modulation.double(0), strict=True)
        )
        for i, double in enumerate(self._double):
            block = partial(double, rotary=rotary, attend=attend)
            img, txt = keep(block, img, txt, modulation.double(i), modulation.after_double(i))
        joint: Stream = torch.cat([txt[0], img[0]], 1), torch.cat([txt[1], img[1]], 1)
        for i, single in enumerate(self._single):
            block = partial(single, rotary=rotary, attend=attend)
            joint = keep(block, joint, modulation.single(i)[2], modulation.after_single(i))
        return model.proj_out(joint[1][:, positions.shape[1] :])
