"""Pictures to embeddings and back: an adapter with its encoders beside a stock Flux pipeline."""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from PIL import Image
from torch import Tensor

from sda_fast import cuda_graphs, pipeline_parts
from sda_fast.adapter import SemanticAdapter
from sda_fast.attachment import attach
from sda_fast.coords import check_int
from sda_fast.decode_arguments import one_of, refuse_filled, sampling, spread_seeds
from sda_fast.dense_mask import dense_mask
from sda_fast.editors.result import Editor, EditResult
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.embedding import MODES, SemanticEmbedding
from sda_fast.fast_checks import check_model
from sda_fast.fast_decode import FastDecoder
from sda_fast.files import write_manifest
from sda_fast.flux_inputs import patch_grid
from sda_fast.flux_parts import check_plain
from sda_fast.flux_prompt import prompt_of
from sda_fast.images import Images, fit_area, group_by_size, put_in_order
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
        editor: what ``edit`` uses; None for no such thing. ``pipe.editor = other`` replaces it.

    Raises:
        ValueError: they do not fit each other.
    """

    def __init__(
        self,
        flux: FluxPipeline,
        adapter: SemanticAdapter,
        defaults: DecodeDefaults | None = None,
        editor: Editor | None = None,
    ) -> None:
        self.flux: Any = flux
        self.adapter: Any = adapter
        pipeline_parts.check_fit(flux, adapter)
        side = self.flux.default_sample_size * self.flux.vae_scale_factor
        self.defaults = defaults or DecodeDefaults(side, side)
        self._decoder: FastDecoder | None = None
        self._turn: Any = nullcontext()  # of threads, once there is a decoder
        self.editor = editor
        patch_grid(self.defaults.height, self.defaults.width, self.patch, name="default ")

    @property
    def patch(self) -> int:
        """Pixels along one image token: 16 for FLUX.1."""
        return self.flux.vae_scale_factor * 2

    @property
    def editor(self) -> Editor | None:
        """What edits embeddings by words, or None."""
        return self._editor

    @editor.setter
    def editor(self, editor: Editor | None) -> None:
        """Refuse, by a ValueError, one that was made for other embeddings."""
        if editor is not None:
            pipeline_parts.check_editor(editor, self.adapter)
        self._editor = editor

    def to(self, *args: Any, **kwargs: Any) -> "SemanticPipeline":
        """Move or cast FLUX, adapter, encoders and editor in place, as ``torch.nn.Module.to``."""
        reader = getattr(self.editor, "text_encoder", None)
        for part in (self.flux, self.adapter, self.editor, reader):
            if hasattr(part, "to"):
                part.to(*args, **kwargs)
        return self

    def encode(self, images: Images) -> SemanticEmbedding:
        """Pictures to embeddings; see ``SemanticAdapter.encode``.

        Args:
            images: a PIL image or path, a list of these in any sizes, or float [B, 3, H, W] in
                [0, 1].
        """
        return self.adapter.encode(images, graph=self._decoder is not None and self._decoder.graph)

    def edit(
        self,
        emb: SemanticEmbedding | EditResult | Images,
        instruction: str | Sequence[str],
    ) -> EditResult:
        """Edit pictures by words, in their embedding alone; ``decode`` draws what came out.

        Args:
            emb: embeddings, an earlier edit that this one goes on from, or pictures.
            instruction: one for all pictures, or one for each.

        Returns:
            The new embedding, what was touched and what was there before.

        Raises:
            ValueError: the pipeline has no editor, or see ``Editor.edit``.
        """
        if self.editor is None:
            raise ValueError("the pipeline has no editor: load one with editor=..., or set .editor")
        known = isinstance(emb, (SemanticEmbedding, EditResult))
        found = emb if known else self.encode(emb)
        if isinstance(self.editor, EmbeddingEditor) and self._decoder is not None:
            return self.editor.edit(found, instruction, graph=self._decoder.graph)
        return self.editor.edit(found, instruction)

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
        for height, width in sizes:
            grey = torch.full((batch, 3, height, width), 0.5)
            emb = (
                pipeline_parts.blank(self.adapter, batch)
                if self.adapter.encoder is None
                else self.encode(grey)
            )
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
        given = {"height": height, "width": width, "steps": steps, "guidance": guidance}
        inputs = sampling(self.defaults, self.patch, given, spread_seeds(seed, len(emb)))
        inputs |= prompt_of(self.flux, emb, options.pop("text", None))
        if "max_area" in inspect.signature(self.flux.__call__).parameters:
            # Kontext would choose other sizes by itself
            inputs |= {"max_area": inputs["height"] * inputs["width"], "_auto_resize": False}
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
        area = self.defaults.height * self.defaults.width
        fitted = [fit_area(tuple(p.shape[-2:]), area, self.patch) for _, p in groups]
        sizes = fitted if height is None else [(height, width)] * len(groups)
        if options.get("output") == "pt" and len(set(sizes)) > 1:
            raise ValueError(
                "output must be 'pil' for pictures of different aspect ratios, or height and width "
                f"given; got 'pt' for sizes {sorted(set(sizes))}"
            )
        rebuilt: list[Any] = [
            self.decode(self.encode(pixels), *size, seed=[seeds[row] for row in places], **options)
            for (places, pixels), size in zip(groups, sizes, strict=True)
        ]
        return put_in_order(rebuilt, rows)

    def interpolate(
        self,
        a: SemanticEmbedding | Images,
        b: SemanticEmbedding | Images,
        steps: int = 5,
        *,
        mode: str = "slerp",
        nodes: Sequence[str] | None = None,
        denoise_steps: int | None = None,
        **options: Any,
    ) -> Pictures:
        """Pictures on the way from a to b, all from the same noise.

        Args:
            a: one picture, or a batch of one embedding.
            b: likewise.
            steps: how many pictures, a and b themselves included; at least 2.
            mode: "slerp" or "lerp" of the positions.
            nodes: paths of the nodes that change, with their descendants; None for all.
            denoise_steps: what ``decode`` calls steps.
            options: of ``decode``.

        Returns:
            As ``decode``, steps pictures in the order of the way.

        Raises:
            ValueError: an argument does not fit.
        """
        check_int("steps", steps, 2)
        one_of("mode", mode, MODES)
        ends = [e if isinstance(e, SemanticEmbedding) else self.encode(e) for e in (a, b)]
        for name, end in zip("ab", ends, strict=True):
            if len(end) != 1:
                raise ValueError(f"{name} must be one picture, got {len(end)}")
        way = ends[0].interpolate(ends[1], steps, mode, nodes)
        return self.decode(way, steps=denoise_steps, **options)

    @classmethod
    def from_pretrained(
        cls,
        path: Folder | None = None,
        *,
        flux: Folder | None = None,
        adapter: Folder | None = None,
        clip: Folder | None = None,
        dino: Folder | None = None,
        editor: Folder | Literal[False] | None = None,
        instructions: Folder | None = None,
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
            editor: of an editor; None: that of path, if the adapter is; False: none.
            instructions: a folder or hub id of the InstructionEncoder that reads for it; None is
                that of path, or FLUX's own T5.
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
        given |= {"editor": editor, "instructions": instructions}
        parts, settings = find_parts(path, given, flux_options)
        offline = bool(flux_options.get("local_files_only"))
        options = {**(settings.encoder or {}), **(encoder or {})}
        model = pipeline_parts.load_adapter(parts, options, dtype, offline)
        decoder = load_flux(parts["flux"], dtype, flux_options)
        edits = pipeline_parts.load_editor(parts, decoder, dtype, offline)
        pipe = cls(decoder, model, settings.decode, edits)
        if settings.patch not in (None, pipe.patch):
            raise ValueError(
                f"flux must have {settings.patch} pixels to an image token, got {pipe.patch}"
            )
        return pipe

    def save_pretrained(self, path: Folder) -> None:
        """Write a folder for each part (``PARTS``), the settings and ``SHA256SUMS``.

        All is written beside path first and put in its place when whole. A pipeline saved there
        before is replaced, but files beside its parts stay; any other folder with something in it
        is refused.

        Raises:
            ValueError: path is a file, such a folder or the working directory, FLUX carries an
                adapter or fused projections, which its config does not tell of, or the editor has
                no folder, as a script.
        """
        check_plain(self.flux.components)
        encoder = self.adapter.encoder
        about = encoder and {name: getattr(encoder, name) for name in ENCODER_SETTINGS}
        settings = Settings(self.patch, self.defaults, about)
        with replaced_when_whole(path) as folder:
            self.flux.save_pretrained(folder / "flux")
            pipeline_parts.save_adapter(self.adapter, folder)
            pipeline_parts.save_editor(self.editor, self.flux, folder)
            write_settings(folder, settings)
            write_manifest(folder)
