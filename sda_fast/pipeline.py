"""Pictures to embeddings and back: an adapter with its encoders beside a stock Flux pipeline."""

import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from PIL import Image
from torch import Tensor

from sda_fast import cuda_graphs
from sda_fast.adapter import SemanticAdapter
from sda_fast.attachment import attach
from sda_fast.coords import check_int
from sda_fast.decode_arguments import check_guidance, one_of, refuse_filled, spread_seeds
from sda_fast.dense_mask import dense_mask
from sda_fast.embedding import SemanticEmbedding
from sda_fast.encoders import ImageEncoder
from sda_fast.fast_checks import check_model
from sda_fast.fast_decode import FastDecoder
from sda_fast.files import write_manifest
from sda_fast.flux_inputs import patch_grid
from sda_fast.flux_parts import check_plain
from sda_fast.flux_prompt import prompt_of
from sda_fast.images import Images, group_by_size
from sda_fast.pipeline_folder import (
    ENCODER_SETTINGS,
    DecodeDefaults,
    Folder,
    Settings,
    find_parts,
    load_flux,
    replaced_when_whole,
    write_settings,
)

Pictures = list[Image.Image] | Tensor


class SemanticPipeline:
    """An adapter that encodes pictures and the frozen FLUX that rebuilds them.

    Both parts stay open to use: ``pipe.flux`` is a stock Flux pipeline (LoRA, offload, schedulers,
    ``set_progress_bar_config``), ``pipe.adapter`` the SemanticAdapter with its encoders.

    Args:
        flux: a Flux pipeline of diffusers whose transformer is a FluxTransformer2DModel. Its
            T5 is never used and may be None; its CLIP text encoder only where neither embedding
            nor adapter has a pooled vector.
        adapter: gives positions as wide as the transformer's text input.
        defaults: sizes, steps and guidance of ``decode``; None is 28 steps, guidance 3.5 and the
            size of the Flux pipeline, 1024 for FLUX.1.

    Raises:
        ValueError: the two do not fit each other.
    """

    def __init__(
        self,
        flux: FluxPipeline,
        adapter: SemanticAdapter,
        defaults: DecodeDefaults | None = None,
    ) -> None:
        self.flux: Any = flux
        self.adapter: Any = adapter
        model = type(getattr(flux, "transformer", None))
        if not issubclass(model, FluxTransformer2DModel):
            raise ValueError(
                "flux must be a diffusers pipeline with a FluxTransformer2DModel, "
                f"got {type(flux).__name__} with {model.__name__}"
            )
        width = self.flux.transformer.config.joint_attention_dim
        if self.adapter.config["out_features"] != width:
            raise ValueError(
                f"adapter must give positions of the {width} channels that flux takes, "
                f"got out_features={self.adapter.config['out_features']}"
            )
        side = self.flux.default_sample_size * self.flux.vae_scale_factor
        self.defaults = defaults or DecodeDefaults(side, side)
        self._decoder: FastDecoder | None = None
        self._turn: Any = nullcontext()  # of threads, once there is a decoder
        patch_grid(self.defaults.height, self.defaults.width, self.patch, name="default ")

    @property
    def patch(self) -> int:
        """Pixels along one image token: 16 for FLUX.1."""
        return self.flux.vae_scale_factor * 2

    def to(self, *args: Any, **kwargs: Any) -> "SemanticPipeline":
        """Move or cast FLUX, adapter and encoders in place, as ``torch.nn.Module.to``."""
        self.flux.to(*args, **kwargs)
        self.adapter.to(*args, **kwargs)
        return self

    def encode(self, images: Images) -> SemanticEmbedding:
        """Pictures to embeddings; see ``SemanticAdapter.encode``.

        Args:
            images: a PIL image or path, a list of these in any sizes, or float [B, 3, H, W] in
                [0, 1].
        """
        return self.adapter.encode(images, graph=self._decoder is not None and self._decoder.graph)

    def compile(self, graph: bool | None = None) -> "SemanticPipeline":
        """From now on decode by ``FastFlux``, and encode and decode as CUDA graphs.

        Pictures stay the same up to rounding. The first call of each size and batch is slow, see
        ``warmup``; calls from several threads take turns.

        Args:
            graph: whether to use CUDA graphs; None means where the weights are on a GPU.

        Raises:
            ValueError: FastFlux cannot run the transformer as it is, and says why.
        """
        check_model(self.flux.transformer)
        device = self.flux.transformer.device.type
        on_gpu = device in cuda_graphs.GRAPH_DEVICES
        if graph and not on_gpu:
            raise ValueError(f"graph must be False for weights on a {device}, got True")
        self._decoder = FastDecoder(on_gpu if graph is None else graph)
        self._turn = self._decoder.turn
        return self

    def warmup(self, sizes: Sequence[tuple[int, int]], batch: int = 1) -> None:
        """Encode and decode something of each size, so that the first picture waits for nothing.

        Args:
            sizes: (height, width) in pixels.
            batch: pictures at once.

        Raises:
            ValueError: a size is no multiple of ``patch``, or batch is below 1.
        """
        check_int("batch", batch, 1)
        for height, width in sizes:
            patch_grid(height, width, self.patch)
        tree, pooled = self.adapter.tree, self.adapter.pooled
        channels = self.adapter.config.out_features
        for height, width in sizes:
            if self.adapter.encoder is None:
                vector = None if pooled is None else pooled.expand(batch, -1)
                tokens = torch.zeros(batch, tree.num_tokens, channels)
                emb = SemanticEmbedding(tokens, tree, vector)
            else:
                emb = self.encode(torch.full((batch, 3, height, width), 0.5))
            self.decode(emb, height, width, steps=1, output="pt")

    @torch.no_grad()
    def decode(
        self,
        emb: SemanticEmbedding,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] = 0,
        rule: str = "overlap",
        **options: Any,
    ) -> Pictures:
        """Rebuild one picture for each embedding of the batch.

        Args:
            emb: B embeddings; device and dtype are adjusted.
            height: pixels, a multiple of ``patch``. None is the default; so for the next three.
            width: likewise.
            steps: denoising steps.
            guidance: scale of the distilled guidance; without effect where the transformer has
                no guidance embedding.
            seed: of the noise, drawn for each picture by itself, so that a picture alone equals
                it in a batch: one for all, or one for each.
            rule: mask rule, "overlap", "local" or "isolated".
            options: ``output`` "pil" or "pt"; ``text`` [1 or B, T, C], an ordinary prompt's
                embeddings; ``isolate_level``; ``attention`` "op", or "mask" for the dense mask in
                diffusers' own attention (IP-Adapters, devices without a kernel). All others go to
                the Flux pipeline: ``image`` for Kontext, which takes it in its own size unless
                ``_auto_resize=True`` ...

        Returns:
            B RGB images, or [B, 3, height, width] in [0, 1] for "pt".

        Raises:
            ValueError: an argument does not fit; nothing has run yet.
        """
        if not isinstance(emb, SemanticEmbedding):
            raise ValueError(f"emb must be a SemanticEmbedding, got {type(emb).__name__}")
        output = one_of("output", options.pop("output", "pil"), ("pil", "pt"))
        attention = one_of("attention", options.pop("attention", "op"), ("op", "mask"))
        refuse_filled(options)
        default = self.defaults
        inputs: dict[str, Any] = {
            "height": default.height if height is None else height,
            "width": default.width if width is None else width,
            "num_inference_steps": check_int("steps", default.steps if steps is None else steps, 1),
            "guidance_scale": check_guidance(default.guidance if guidance is None else guidance),
            "generator": [torch.Generator().manual_seed(s) for s in spread_seeds(seed, len(emb))],
        }
        height, width = inputs["height"], inputs["width"]
        patch_grid(height, width, self.patch)
        inputs |= prompt_of(self.flux, emb, options.pop("text", None))
        if "max_area" in inspect.signature(self.flux.__call__).parameters:
            # Kontext would choose other sizes by itself
            inputs |= {"max_area": height * width, "_auto_resize": False}
        how = emb.tree, rule, options.pop("isolate_level", None)
        if self._decoder is not None and attention == "op":
            return self._decoder(self.flux, inputs | options, how, output)
        mask_by = attach if attention == "op" else dense_mask
        with self._turn, mask_by(self.flux.transformer, emb.tree, rule, isolate_level=how[2]):
            return self.flux(**{**inputs, **options}, output_type=output).images

    def reconstruct(
        self,
        images: Images,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> Pictures:
        """Encode pictures and rebuild them.

        Args:
            images: as in ``encode``.
            height: pixels. Without height and width each picture keeps its aspect ratio, at the
                area of the default size, in whole image tokens.
            width: given with height or not at all.
            seed: one for all, or one for each picture.
            options: of ``decode``.

        Returns:
            As ``decode``, in the order of images.

        Raises:
            ValueError: an argument does not fit, or output="pt" is asked of pictures that come out
                in different sizes.
        """
        if (height is None) != (width is None):
            raise ValueError(f"height and width must come together, got {height} and {width}")
        groups = list(group_by_size(images))
        rows = [row for places, _ in groups for row in places]
        seeds = spread_seeds(seed, len(rows))
        keep = height is None
        sizes = [self._fit(*p.shape[-2:]) if keep else (height, width) for _, p in groups]
        if options.get("output") == "pt" and len(set(sizes)) > 1:
            raise ValueError(
                "output must be 'pil' for pictures of different aspect ratios, or height and width "
                f"given; got 'pt' for sizes {sorted(set(sizes))}"
            )
        rebuilt: list[Any] = [
            self.decode(self.encode(pixels), *size, seed=[seeds[row] for row in places], **options)
            for (places, pixels), size in zip(groups, sizes, strict=True)
        ]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        if isinstance(rebuilt[0], Tensor):
            return torch.cat(rebuilt)[order]
        pictures = [picture for group in rebuilt for picture in group]
        return [pictures[place] for place in order]

    def interpolate(
        self,
        a: SemanticEmbedding | Images,
        b: SemanticEmbedding | Images,
        steps: int = 5,
        *,
        method: str = "slerp",
        nodes: Sequence[str] | None = None,
        denoise_steps: int | None = None,
        **options: Any,
    ) -> Pictures:
        """Pictures on the way from a to b, all from the same noise.

        Args:
            a: one picture, or a batch of one embedding.
            b: likewise.
            steps: how many pictures, a and b themselves included; at least 2.
            method: "slerp" or "lerp" of the positions.
            nodes: paths of the nodes that change, with their descendants; None for all.
            denoise_steps: what ``decode`` calls steps.
            options: of ``decode``.

        Returns:
            As ``decode``, steps pictures in the order of the way.

        Raises:
            ValueError: an argument does not fit.
        """
        check_int("steps", steps, 2)
        one_of("method", method, ("slerp", "lerp"))
        nodes = None if nodes is None else tuple(nodes)  # each frame reads it
        ends = [e if isinstance(e, SemanticEmbedding) else self.encode(e) for e in (a, b)]
        for name, end in zip("ab", ends, strict=True):
            if len(end) != 1:
                raise ValueError(f"{name} must be one picture, got {len(end)}")
        mix = getattr(ends[0], method)
        way = [mix(ends[1], i / (steps - 1), nodes=nodes) for i in range(steps)]
        return self.decode(SemanticEmbedding.cat(way), steps=denoise_steps, **options)

    @classmethod
    def from_pretrained(
        cls,
        path: Folder | None = None,
        *,
        flux: Folder | None = None,
        adapter: Folder | None = None,
        clip: Folder | None = None,
        dino: Folder | None = None,
        dtype: torch.dtype = torch.float32,
        encoder: dict[str, Any] | None = None,
        **flux_options: Any,
    ) -> "SemanticPipeline":
        """Load a whole pipeline, or put one together from parts.

        Args:
            path: "scenes", the model that comes with the package (also when nothing is given); or
                a folder that ``save_pretrained`` wrote, or its hub id. Its files are compared with
                its ``SHA256SUMS``, if it has one.
            flux: a folder or hub id in the layout of a Flux pipeline. This and the next three
                stand in for the part of path, or make path needless.
            adapter: a folder or hub id of a SemanticAdapter.
            clip: a folder or hub id of the contrastive encoder.
            dino: a folder or hub id of the DINOv2 encoder. Without encoders the pipeline can only
                decode.
            dtype: of all weights; ``torch_dtype`` is another name for it.
            encoder: settings of ``ImageEncoder`` (size, squash, ...) other than those of path.
            flux_options: to diffusers' ``from_pretrained``: ``text_encoder_2=None,
                tokenizer_2=None`` leaves T5 out, which nothing here needs; ``variant``,
                ``quantization_config`` ... ``local_files_only`` counts for all hub ids,
                ``revision``, ``token`` and ``cache_dir`` for flux alone.

        Raises:
            ValueError: parts are missing or do not fit, a file is torn, foreign, pickled or not
                what its checksum says, or a config is another model's.
            OSError: a folder is not there, or the hub is out of reach.
        """
        dtype = flux_options.pop("torch_dtype", dtype)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be a torch.dtype, got {dtype!r}")
        given = {"flux": flux, "adapter": adapter, "clip": clip, "dino": dino}
        parts, settings = find_parts(path, given, flux_options)
        offline = bool(flux_options.get("local_files_only"))
        model = SemanticAdapter.from_pretrained(
            parts["adapter"], dtype=dtype, local_files_only=offline
        ).eval()
        if parts["clip"] and parts["dino"]:
            options = {**(settings.encoder or {}), **(encoder or {})}
            model.set_encoder(
                ImageEncoder.from_pretrained(
                    parts["clip"], parts["dino"], dtype, offline, **options
                )
            )
        decoder = load_flux(parts["flux"], dtype, flux_options)
        pipe = cls(decoder, model, settings.decode)
        if settings.patch not in (None, pipe.patch):
            raise ValueError(
                f"flux must have {settings.patch} pixels to an image token, got {pipe.patch}"
            )
        return pipe

    def save_pretrained(self, path: Folder) -> None:
        """Write ``flux/``, ``adapter/``, ``clip/``, ``dino/``, the settings and ``SHA256SUMS``.

        All is written beside path first and put in its place when whole. A pipeline saved there
        before is replaced, but files beside its parts stay; any other folder with something in it
        is refused.

        Raises:
            ValueError: path is a file, such a folder or the working directory, or FLUX carries an
                adapter or fused projections, which its config does not tell of.
        """
        check_plain(self.flux.components)
        encoder = self.adapter.encoder
        about = encoder and {name: getattr(encoder, name) for name in ENCODER_SETTINGS}
        settings = Settings(self.patch, self.defaults, about)
        with replaced_when_whole(path) as folder:
            self.flux.save_pretrained(folder / "flux")
            self.adapter.save_pretrained(folder / "adapter")
            if encoder is not None:
                encoder.clip.save_pretrained(folder / "clip")
                encoder.dino.save_pretrained(folder / "dino")
            write_settings(folder, settings)
            write_manifest(folder)

    def _fit(self, height: int, width: int) -> tuple[int, int]:
        """The default area at the aspect ratio of a picture, in whole image tokens."""
        scale = math.sqrt(self.defaults.height * self.defaults.width / (height * width))
        rows, cols = (max(1, round(side * scale / self.patch)) for side in (height, width))
        return rows * self.patch, cols * self.patch
