"""Two frozen vision encoders, joined patch by patch: what the adapter sees of a picture."""

import math
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sda_fast.ops.device_tables import kept_table
from sda_fast.weights import check_weights, read_config, resolve_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Triple = tuple[float, float, float]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

# model_type of a config -> (class in transformers, pixel mean and std it was trained with)
CLIP_KINDS = {
    "clip": ("CLIPVisionModel", CLIP_MEAN, CLIP_STD),
    "clip_vision_model": ("CLIPVisionModel", CLIP_MEAN, CLIP_STD),
    "siglip": ("SiglipVisionModel", HALF, HALF),
    "siglip_vision_model": ("SiglipVisionModel", HALF, HALF),
    "internvl_vision": ("InternVLVisionModel", IMAGENET_MEAN, IMAGENET_STD),
}
DINO_KINDS = {
    "dinov2": ("Dinov2Model", IMAGENET_MEAN, IMAGENET_STD),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGENET_MEAN, IMAGENET_STD),
}
# these take positions of another grid only when told; the others always resample theirs
TOLD_TO_INTERPOLATE = ("clip_vision_model", "siglip_vision_model")


class ImageEncoder(nn.Module):
    """A CLIP-like encoder and a DINOv2, their patch features side by side on channels.

    Each gives its penultimate hidden state without class and register tokens; the coarser grid is
    resampled bilinearly to the finer one. Both are frozen and stay in evaluation mode.

    Aspect: a picture is resized (bicubic, antialiased, f32) to whole patches, so many that their
    number stays about that of the square, ``n = size // patch`` to a side, and their rows and
    columns are as the picture's sides: ``h = round(n sqrt(H / W))``, ``w = round(n sqrt(W / H))``,
    at least 1 and at most ``n * n``. What rounding leaves is stretched: below half a patch a
    side. The encoders' position tables are resampled to that grid. ``squash=True`` squeezes every
    picture into the square instead, as DFN CLIP was trained.

    Args:
        clip: a ``transformers`` CLIP or SigLIP vision model or InternVL vision model (InternViT).
        dino: a ``Dinov2Model`` or ``Dinov2WithRegistersModel``.
        size: side in pixels of a square picture's input, in both.
        clip_mean: per channel, subtracted from pixels in [0, 1]. None is what the kind of model
            was trained with; so for the three below.
        clip_std: per channel, divides.
        dino_mean: likewise.
        dino_std: likewise.
        squash: see above.

    Attributes:
        out_features: channels of a patch, both encoders together.
        patch_sizes: pixels to a side of a patch in clip and in dino.

    Raises:
        ValueError: a model of another kind, a size below one patch, a std that is not positive.
    """

    def __init__(
        self,
        clip: "PreTrainedModel",
        dino: "PreTrainedModel",
        size: int = 378,
        clip_mean: Triple | None = None,
        clip_std: Triple | None = None,
        dino_mean: Triple | None = None,
        dino_std: Triple | None = None,
        squash: bool = False,
    ) -> None:
        super().__init__()
        _, mean, std = _kind_of(clip.config.model_type, CLIP_KINDS, "clip")
        self.clip_mean, self.clip_std = clip_mean or mean, clip_std or std
        _, mean, std = _kind_of(dino.config.model_type, DINO_KINDS, "dino")
        self.dino_mean, self.dino_std = dino_mean or mean, dino_std or std
        for name in ("clip_mean", "clip_std", "dino_mean", "dino_std"):
            values = getattr(self, name)
            if len(values) != 3 or (name.endswith("std") and not min(values) > 0):
                raise ValueError(f"{name} must be three numbers, a std positive, got {values}")
        self.patch_sizes = _patch_size(clip), _patch_size(dino)
        if size < max(self.patch_sizes):
            raise ValueError(f"size must hold a patch of {max(self.patch_sizes)}, got {size}")
        self.size = size
        self.squash = squash
        self.out_features: int = clip.config.hidden_size + dino.config.hidden_size
        self.clip = clip
        self.dino = dino
        self.num_trained = 0  # layers of dino that are, or once were, open
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Encode B pictures of one size.

        Args:
            pixels: [B, 3, H, W] in [0, 1], float, on any device.

        Returns:
            (features [B, h * w, C1 + C2] in raster order, in the dtype of the encoders; (h, w)).

        Raises:
            ValueError: pixels is no such tensor.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"pixels must be float [B, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}"
            )
        pixels = pixels.to(self.clip.device, torch.float32)
        maps = [
            self._patch_map(self.clip, pixels, self.patch_sizes[0], self.clip_mean, self.clip_std),
            self._patch_map(self.dino, pixels, self.patch_sizes[1], self.dino_mean, self.dino_std),
        ]
        h, w = max((m.shape[-2:] for m in maps), key=math.prod)
        maps = [
            m if m.shape[-2:] == (h, w) else F.interpolate(m, (h, w), mode="bilinear") for m in maps
        ]
        return rearrange(torch.cat(maps, dim=1), "b c h w -> b (h w) c"), (h, w)

    def grid(self, height: int, width: int, patch: int) -> tuple[int, int]:
        """(h, w): rows and columns of patches for a picture of these sides, in any unit."""
        n = self.size // patch
        if self.squash:
            return n, n
        stretch = math.sqrt(height / width)
        h, w = (min(max(1, round(side)), n * n) for side in (n * stretch, n / stretch))
        return h, w

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Stay in evaluation mode: open layers learn without dropout too."""
        return super().train(False)

    def unfreeze_last(self, num_layers: int) -> None:
        """Open the last layers of dino that the features depend on; everything else is frozen.

        The features leave before dino's very last layer, so ``num_layers`` counts back from the
        layer before it.

        Raises:
            ValueError: num_layers is negative or more than there are.
        """
        layers = self._feature_layers()
        if not 0 <= num_layers <= len(layers):
            raise ValueError(f"num_layers must be 0 to {len(layers)}, got {num_layers}")
        self.requires_grad_(False)
        for layer in layers[len(layers) - num_layers :]:
            layer.requires_grad_(True)
        self.num_trained = max(self.num_trained, num_layers)

    def opened_layers(self) -> dict[int, nn.Module]:
        """Every layer of dino that was ever opened, by its number."""
        layers = self._feature_layers()
        return {i: layers[i] for i in range(len(layers) - self.num_trained, len(layers))}

    def trained_layers(self) -> dict[str, Tensor]:
        """Parameters of every layer that was ever opened, as ``dino.layers.INDEX.NAME``."""
        return {
            f"dino.layers.{index}.{name}": value
            for index, layer in self.opened_layers().items()
            for name, value in layer.state_dict().items()
        }

    @torch.no_grad()
    def load_trained_layers(self, state: dict[str, Tensor]) -> None:
        """Take over what ``trained_layers`` of such an encoder returned; nothing is opened.

        Raises:
            ValueError: the names or shapes are not those of this dino's last layers.
        """
        layers = self._feature_layers()
        count = len({name.split(".")[2] for name in state if name.startswith("dino.layers.")})
        mine = {
            f"dino.layers.{index}.{name}": value
            for index in range(max(0, len(layers) - count), len(layers))
            for name, value in layers[index].state_dict().items()
        }
        odd = sorted(
            name
            for name in mine.keys() | state.keys()
            if name not in mine or name not in state or mine[name].shape != state[name].shape
        )
        if odd or not state:
            raise ValueError(f"the trained layers do not fit dino: {odd[:4] or 'there are none'}")
        for name, value in mine.items():
            value.copy_(state[name])
        self.num_trained = max(self.num_trained, count)

    @classmethod
    def from_pretrained(
        cls,
        clip: str | PathLike[str],
        dino: str | PathLike[str],
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
        **options: Any,
    ) -> "ImageEncoder":
        """Load both encoders from folders in the layout of ``transformers``, or from the hub.

        Args:
            clip: folder or hub id of a CLIP or SigLIP (whole or vision part) or an InternVL vision
                model.
            dino: folder or hub id of a DINOv2, with or without registers.
            dtype: of the weights.
            local_files_only: take hub ids from the cache alone.
            options: of the constructor: size, squash, means and stds.

        Raises:
            OSError: a folder is not there, or the hub is out of reach.
            ValueError: the model is of another kind, or its weights are pickled, truncated or
                incomplete.
        """
        clip_model = _load(clip, CLIP_KINDS, "clip", dtype, local_files_only)
        dino_model = _load(dino, DINO_KINDS, "dino", dtype, local_files_only)
        return cls(clip_model, dino_model, **options)

    def _patch_map(
        self, model: "PreTrainedModel", pixels: Tensor, patch: int, mean: Triple, std: Triple
    ) -> Tensor:
        """Penultimate patch tokens of one encoder, [B, C, h, w]."""
        h, w = self.grid(pixels.shape[2], pixels.shape[3], patch)
        if pixels.shape[-2:] != (h * patch, w * patch):
            size = (h * patch, w * patch)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (pixels - _channels(mean, pixels)) / _channels(std, pixels)
        told = model.config.model_type in TOLD_TO_INTERPOLATE
        options = {"interpolate_pos_encoding": True} if told else {}
        output = model(pixels.to(model.dtype), output_hidden_states=True, **options)
        tokens = output.hidden_states[-2]
        # class and register tokens come first, however many there are
        patches = tokens[:, tokens.shape[1] - h * w :]
        return rearrange(patches, "b (h w) c -> b c h w", h=h, w=w)

    def _feature_layers(self) -> nn.ModuleList:
        """Dino's layers but the last; found by their number, as their name changes."""
        depth = self.dino.config.num_hidden_layers
        stacks = [
            m for m in self.dino.modules() if isinstance(m, nn.ModuleList) and len(m) == depth
        ]
        return stacks[0][: depth - 1]


def _channels(values: Triple, like: Tensor) -> Tensor:
    return kept_table(_column, (values,), like, "an encoder must run once with these means")


def _column(values: Triple) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1)


def _kind_of(
    model_type: str | None, kinds: dict[str, tuple[str, Triple, Triple]], argument: str
) -> tuple[str, Triple, Triple]:
    if model_type not in kinds:
        raise ValueError(
            f"{argument} must be one of {sorted(kinds)}, got a model of {model_type!r}"
        )
    return kinds[model_type]


def _patch_size(model: "PreTrainedModel") -> int:
    patch = model.config.patch_size
    if isinstance(patch, int):
        return patch
    if len(set(patch)) != 1:
        raise ValueError(f"the encoder's patches must be square, got {patch}")
    return patch[0]


def _load(
    path: str | PathLike[str],
    kinds: dict[str, tuple[str, Triple, Triple]],
    argument: str,
    dtype: torch.dtype,
    local_files_only: bool,
) -> "PreTrainedModel":
    import transformers

    folder = resolve_folder(path, argument, local_files_only)
    name, _, _ = _kind_of(read_config(folder, argument).get("model_type"), kinds, argument)
    check_weights(folder, argument)
    model, info = getattr(transformers, name).from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    # a whole CLIP has unexpected keys: its text half
    faults = {k: sorted(map(str, info[k])) for k in ("missing_keys", "mismatched_keys") if info[k]}
    if faults:
        raise ValueError(f"{argument}: the weights in {folder} do not fit its config: {faults}")
    return model
