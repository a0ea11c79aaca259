"""The semantic adapter: patch features of a picture in, a semantic embedding out."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from sda_fast.adapter_config import PRESETS, check_config
from sda_fast.coords import patch_coords
from sda_fast.cuda_graphs import GraphCache
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy
from sda_fast.images import Images, group_by_size
from sda_fast.model_folder import FolderModel
from sda_fast.ops.device_tables import kept_table
from sda_fast.qformer import QFormer, RMSNorm
from sda_fast.weights import read_safetensors, write_safetensors

if TYPE_CHECKING:
    from sda_fast.encoders import ImageEncoder

ENCODER_FILE = "encoder_layers.safetensors"


class SemanticAdapter(FolderModel):
    """Patch features -> two-layer MLP -> QFormer -> Linear and RMSNorm: one vector a position.

    The encoder that makes the features is attached with ``set_encoder`` and stays outside the
    state dict and ``parameters()``; only layers of it that were opened for training are saved, in
    a file of their own. ``.to`` takes an attached encoder along.

    Args:
        tokens_per_node: of the ``Hierarchy`` of the output.
        in_features: F, channels of a patch: both encoders together.
        width: of the QFormer.
        num_layers: of the QFormer.
        num_heads: of the QFormer; divides width into a head dim that is a multiple of 16.
        out_features: C, channels of a position: what the decoder takes as txt (4096 in FLUX).
        cross_attention_every: layers 0, k, 2k, ... of the QFormer read the patches.
        cross_attention_rope: rotate the cross-attention by (level, y, x).
        self_attention_rope: rotate the self-attention too.
        pooled_features: P, width of the pooled vector handed to every embedding (768 in FLUX),
            stored as the buffer ``pooled`` [P], zeros until it is set; None for no such vector: a
            pipeline then embeds the empty prompt.

    Raises:
        ValueError: a size or another argument that cannot be; the message names it.
    """

    role = "adapter"
    beside = (ENCODER_FILE,)
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        tokens_per_node: Sequence[int] = (32, 8, 4),
        in_features: int = 2304,
        width: int = 1024,
        num_layers: int = 12,
        num_heads: int = 16,
        out_features: int = 4096,
        cross_attention_every: int = 1,
        cross_attention_rope: bool = True,
        self_attention_rope: bool = False,
        pooled_features: int | None = None,
    ) -> None:
        super().__init__()
        check_config(self.config)
        self.tree = Hierarchy(tuple(tokens_per_node))
        self.in_features = in_features
        self.norm_in = RMSNorm(in_features)
        self.mlp = nn.Sequential(nn.Linear(in_features, width), nn.GELU(), nn.Linear(width, width))
        self.qformer = QFormer(
            self.tree.num_tokens,
            width,
            num_layers,
            num_heads,
            cross_attention_every,
            cross_attention_rope,
            self_attention_rope,
        )
        self.proj_out = nn.Linear(width, out_features)
        self.norm_out = RMSNorm(out_features)
        pooled = None if pooled_features is None else torch.zeros(pooled_features)
        self.register_buffer("pooled", pooled)
        self._encoder: list[ImageEncoder] = []  # a list hides it from nn.Module
        self._encoder_layers: dict[str, Tensor] = {}  # kept while there is no encoder
        self._graphs = GraphCache()

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Turn the features of B pictures with one patch grid into embedding positions.

        Args:
            features: [B, S, F], float, patches in raster order.
            grid: (h, w) in patches, S = h * w.

        Returns:
            [B, N, C], in the dtype of the weights.

        Raises:
            ValueError: features do not fit the adapter or the grid.
        """
        h, w = grid
        if features.ndim != 3 or features.shape[2] != self.in_features:
            raise ValueError(
                f"features must be [B, S, {self.in_features}], got {tuple(features.shape)}"
            )
        if features.shape[1] != h * w:
            raise ValueError(f"features must hold {h} x {w} patches, got {features.shape[1]}")
        wanted = "an adapter must run once with this grid"
        q_coords = kept_table(Hierarchy.token_coords, (self.tree, h, w), features, wanted)
        k_coords = kept_table(patch_coords, (h, w), features, wanted)
        patches = self.mlp(self.norm_in(features.to(self.proj_out.weight.dtype)))
        x = self.qformer(patches, q_coords, k_coords)
        return self.norm_out(self.proj_out(x))

    @property
    def encoder(self) -> "ImageEncoder | None":
        """The attached encoder, or None."""
        return self._encoder[0] if self._encoder else None

    def set_encoder(self, encoder: "ImageEncoder | None") -> None:
        """Attach the encoder that ``encode`` uses; None takes it off.

        Layers that were opened in training belong to the adapter: those saved with it, or those of
        the encoder that was attached before, are copied into the new one.

        Raises:
            ValueError: its features are not as wide as the adapter's input, or the saved layers
                are not of such an encoder.
        """
        layers = self._trained_layers()
        if encoder is not None:
            if encoder.out_features != self.in_features:
                raise ValueError(
                    f"encoder must give {self.in_features} features a patch, "
                    f"got one that gives {encoder.out_features}"
                )
            if layers:
                encoder.load_trained_layers(layers)
        self._graphs.clear()
        self._encoder_layers = layers
        self._encoder = [] if encoder is None else [encoder]

    @torch.no_grad()
    def encode(self, images: Images, graph: bool = False) -> SemanticEmbedding:
        """Turn pictures into their embedding.

        Args:
            images: a PIL image, a path, a list of these in any sizes, or a float tensor
                [B, 3, H, W] in [0, 1]. Pictures of one size go through together.
            graph: run encoder and adapter as a CUDA graph, captured at the first call for a number
                and size of pictures: one launch in place of a thousand, the lowest latency of small
                batches. The last 8 are kept. Weights, modes and settings that change are seen;
                hooks run at captures only. The same result up to rounding.

        Returns:
            B embeddings in the order given, on the adapter's device and in its dtype, with the
            adapter's pooled vector if it has one.

        Raises:
            ValueError: no encoder is attached, the list is empty, a picture cannot be used, or a
                graph is wanted of weights that are not all on one CUDA device.
            RuntimeError: the encoder does what no CUDA graph can hold.
        """
        encoder = self.encoder
        if encoder is None:
            raise ValueError("the adapter has no encoder: attach one with set_encoder(encoder)")
        rows: list[int] = []
        batches: list[Tensor] = []
        for places, pixels in group_by_size(images):
            if graph:
                read = self._read, [pixels], [self, encoder]
                batches.append(self._graphs.run(*read, about=self._settings(encoder)))
            else:
                batches.append(self._read(pixels))
            rows += places
        tokens = torch.cat(batches)[torch.tensor(rows).argsort().to(self.device)]
        pooled = None if self.pooled is None else self.pooled.expand(len(rows), -1)
        return SemanticEmbedding(tokens, self.tree, pooled)

    def _settings(self, encoder: "ImageEncoder") -> tuple:
        """What ``_read`` depends on beside weights, modes and shapes."""
        of_encoder = (
            encoder.size, encoder.squash, encoder.clip_mean, encoder.clip_std, encoder.dino_mean,
            encoder.dino_std,
        )  # fmt: skip
        qformer = self.qformer
        rotates = qformer.cross_attention_rope, qformer.self_attention_rope
        return self.tree, rotates, *map(str, of_encoder)

    def _read(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] -> positions [B, N, C]."""
        assert self.encoder is not None
        features, grid = self.encoder(pixels)
        return self(features.to(self.device), grid)

    @torch.no_grad()
    def grow(self, tree: Hierarchy, noise: float = 0.05, seed: int = 0) -> Tensor:
        """Give the adapter more positions, in place; what it had stays bit for bit.

        A new position of a node starts as one of the node's own queries or, where it had none, of
        its nearest ancestor's, plus noise. The parameter ``qformer.queries`` is replaced, so
        an optimizer must be told: rows of its state move as the result says.

        Args:
            tree: the new hierarchy: no fewer levels, no fewer positions a node in any of them.
            noise: standard deviation of the noise, in units of the copied queries' RMS.
            seed: of the noise.

        Returns:
            [N_old] int64: where each old position is now.

        Raises:
            ValueError: tree is no Hierarchy or smaller somewhere, or noise is negative or not
                finite.
        """
        if not isinstance(tree, Hierarchy):
            raise ValueError(f"tree must be a Hierarchy, got {tree!r}")
        old = self.tree
        known = old.tokens_per_node
        if tree.num_levels < old.num_levels or any(
            new < had for had, new in zip(known, tree.tokens_per_node, strict=False)
        ):
            raise ValueError(
                f"tree must not shrink any level of {known}, got {tree.tokens_per_node}"
            )
        if not 0 <= noise < math.inf:  # nor NaN
            raise ValueError(f"noise must not be negative and must be finite, got {noise}")
        queries = self.qformer.queries
        kept, source = _plan_growth(old, tree)
        grown = queries[source.to(queries.device)]
        generator = torch.Generator().manual_seed(seed)
        jitter = torch.randn(grown.shape, generator=generator).to(grown)
        rms = grown.square().mean(dim=-1, keepdim=True).sqrt()
        grown += noise * rms * jitter
        grown[kept.to(queries.device)] = queries
        self.qformer.queries = nn.Parameter(grown, requires_grad=queries.requires_grad)
        self.tree = tree
        self.register_to_config(tokens_per_node=tree.tokens_per_node)
        return kept

    @classmethod
    def from_preset(cls, name: str = "reference") -> "SemanticAdapter":
        """A new adapter with random weights, in the configuration of ``PRESETS[name]``.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"name must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name].config)

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """See ``FolderModel``."""
        check_config(config)

    def save_beside(self, folder: Path) -> None:
        """Write the encoder's open layers, if any were opened."""
        layers = self._trained_layers()
        if layers:
            write_safetensors(folder / ENCODER_FILE, layers)

    def load_beside(self, folder: Path) -> None:
        """See ``FolderModel``."""
        if (folder / ENCODER_FILE).is_file():
            self._encoder_layers = read_safetensors(folder / ENCODER_FILE)

    def _trained_layers(self) -> dict[str, Tensor]:
        return self._encoder_layers if self.encoder is None else self.encoder.trained_layers()

    def _apply(self, fn: Callable, recurse: bool = True) -> "SemanticAdapter":
        self._graphs.clear()  # what moves the weights off a GPU wants its memory
        super()._apply(fn, recurse)
        if self.encoder is not None:
            self.encoder._apply(fn, recurse)
        return self


def _plan_growth(old: Hierarchy, new: Hierarchy) -> tuple[Tensor, Tensor]:
    """(where each old position goes [N_old], which old query each new position copies [N_new])."""
    kept: list[int] = []
    source: list[int] = []
    own: dict[tuple[int, int, int], list[int]] = {}
    for node in new.nodes():
        place = node.level, node.row, node.col
        inherited = own.get((node.level - 1, node.row // 2, node.col // 2))
        had = old.node(node.path) if node.level < old.num_levels else None
        mine = list(range(had.start, had.stop)) if had is not None else []
        kept += [node.start + i for i in range(len(mine))]
        # a tree whose root holds nothing has no ancestor to copy: any old query will do
        own[place] = mine or inherited or list(range(old.num_tokens))
        source += [own[place][i % len(own[place])] for i in range(node.stop - node.start)]
    return torch.tensor(kept), torch.tensor(source)
