"""The folder of a saved pipeline: its layout, settings and checksums, and the FLUX in it.

``flux/`` is a stock Flux pipeline, ``adapter/`` a SemanticAdapter, ``clip/`` and ``dino/`` are
vision encoders, ``editor/`` is an editor and ``instructions/`` what reads for it, both
optional; ``semantic_pipeline.json`` holds settings, ``SHA256SUMS`` all checksums.
"""

import json
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module, resources
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub.errors import HfHubHTTPError

from sda_fast.files import MANIFEST, check_manifest
from sda_fast.flux_parts import OWN_VAE, check_loaded, check_parts
from sda_fast.weights import DTYPE, require_folder, resolve_folder

SHIPPED = "scenes"  # the model that comes with the package
SETTINGS, CLASS, FORMAT = "semantic_pipeline.json", "SemanticPipeline", 1
ENCODER_SETTINGS = ("size", "clip_mean", "clip_std", "dino_mean", "dino_std", "squash")

# of diffusers' from_pretrained, for the repository that is fetched
FLUX_HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "proxies")
OPTIONAL = ("editor", "instructions")
PARTS = ("flux", "adapter", "clip", "dino", *OPTIONAL)  # folders of a saved pipeline

Folder = str | PathLike[str]


@dataclass(frozen=True)
class DecodeDefaults:
    """What ``decode`` uses where the caller says nothing.

    Attributes:
        height: pixels.
        width: pixels.
        steps: denoising steps.
        guidance: scale of the distilled guidance.
    """

    height: int
    width: int
    steps: int = 28
    guidance: float = 3.5


@dataclass(frozen=True)
class Settings:
    """What ``semantic_pipeline.json`` holds; all None where there is no such file.

    Attributes:
        patch: pixels along one image token.
        decode: of ``SemanticPipeline.decode``.
        encoder: ``ENCODER_SETTINGS`` of ``ImageEncoder``; None where the folder has no encoders.
    """

    patch: int | None = None
    decode: DecodeDefaults | None = None
    encoder: dict[str, Any] | None = None


def find_parts(
    path: Folder | None, given: Mapping[str, Folder | Literal[False] | None], hub: dict[str, Any]
) -> tuple[dict[str, Any], Settings]:
    """Where each of PARTS comes from, or None, and the settings of path.

    Args:
        path: a saved pipeline, or None; with nothing given either it is the shipped one.
        given: folder or hub id of each part that does not come from path, else None; False for an
            editor that is left out.
        hub: options for hub ids. Only ``local_files_only`` counts for others than flux; the rest
            are refused beside such ids, as a revision is one repository's own.

    Raises:
        OSError: a folder is not there, or the hub is out of reach.
        ValueError: a part is missing, a file of path is not what it was, or options beside a hub
            id do not reach it.
    """
    for name, part in (("path", path), *given.items()):
        lost = [option for option in FLUX_HUB_OPTIONS if hub.get(option) is not None]
        if name != "flux" and part and part != SHIPPED and _is_hub_id(part) and lost:
            raise ValueError(
                f"{', '.join(lost)} must come with folders, as only flux is fetched with it, got "
                f"the hub id {str(part)!r} as {name}: download it and give its folder"
            )
    parts: dict[str, Any] = dict.fromkeys(PARTS) | dict(given)
    settings = Settings()
    if path is not None or not any(given.values()):
        root = find_root(SHIPPED if path is None else path, bool(hub.get("local_files_only")))
        root = root.absolute()  # so that no part that is missing looks like a hub id
        settings = read_settings(root)
        own = ("flux", "adapter", *(("clip", "dino") if settings.encoder else ()))
        if given.get("editor") is None and given["adapter"] is None:  # it knows that adapter alone
            own += tuple(name for name in OPTIONAL if (root / name).is_dir())
        elif given.get("editor") and (root / "instructions").is_dir():
            own += ("instructions",)
        parts |= {name: given.get(name) or root / name for name in own}
    if not (parts["flux"] and parts["adapter"]) or bool(parts["clip"]) != bool(parts["dino"]):
        raise ValueError(
            "from_pretrained must be given path, or flux and adapter, and clip together with dino "
            f"to encode; got {', '.join(name for name, part in parts.items() if part)}"
        )
    return parts, settings


def find_root(path: Folder, local_files_only: bool = False) -> Path:
    """The folder of a saved pipeline: the shipped one by name, a folder, or a hub id.

    Its files are compared with its manifest, if it has one; the shipped one has.

    Raises:
        OSError: there is no such folder, or the hub is out of reach.
        ValueError: a file is not what its checksum says.
    """
    if path == SHIPPED:
        root = require_folder(Path(str(resources.files("sda_fast"))) / "scenes" / "weights", "path")
        if not (root / MANIFEST).is_file():
            raise FileNotFoundError(f"the shipped model has no {MANIFEST} in {root}: reinstall")
    else:
        root = resolve_folder(path, "path", local_files_only)
    if (root / MANIFEST).is_file():
        check_manifest(root)
    return root


def read_settings(root: Path) -> Settings:
    """What ``write_settings`` wrote.

    Raises:
        FileNotFoundError: the folder holds no saved pipeline.
        ValueError: the file is foreign or of another format.
    """
    file = root / SETTINGS
    if not file.is_file():
        raise FileNotFoundError(f"path must be a saved pipeline, got {root} without {SETTINGS}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind, version = found["_class_name"], found["format"]
        encoder = found["encoder"]
        if encoder is not None:
            encoder = {k: tuple(v) if isinstance(v, list) else v for k, v in encoder.items()}
        settings = Settings(found["patch"], DecodeDefaults(**found["decode"]), encoder)
        known = encoder is None or set(encoder) == set(ENCODER_SETTINGS)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} must be the settings of a {CLASS}: {error!r}") from error
    if (kind, version) != (CLASS, FORMAT) or not known:
        raise ValueError(
            f"{file} must be the settings of a {CLASS}, format {FORMAT}, got {kind!r}, format "
            f"{version!r}, with encoder {settings.encoder}"
        )
    return settings


def write_settings(root: Path, settings: Settings) -> None:
    """Write ``semantic_pipeline.json``; equal settings give equal bytes."""
    about = {"_class_name": CLASS, "format": FORMAT, **asdict(settings)}
    text = json.dumps(about, indent=2, sort_keys=True)
    (root / SETTINGS).write_text(text + "\n", encoding="utf-8")


@contextmanager
def replaced_when_whole(path: Folder) -> Generator[Path, None, None]:
    """A new folder beside path that takes its place at the end, if nothing was raised.

    What lies in a saved pipeline and is none of its parts, such as a README, is carried over.
    Whatever fails, path is as it was.

    Raises:
        ValueError: path is a file, a folder of anything but a saved pipeline, or the working
            directory or a folder around it, which cannot be replaced beneath its user.
    """
    target = Path(path).resolve()
    foreign = target.is_dir() and any(target.iterdir()) and not (target / SETTINGS).is_file()
    if target.is_file() or foreign:
        raise ValueError(f"path must be new, empty or a saved pipeline, got {target}")
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"path must not be the working directory or around it, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        _swap(target, new, old)
    finally:
        # an old folder that could not be put back is kept
        if target.exists() or not old.exists():
            shutil.rmtree(scratch, ignore_errors=True)


def _swap(target: Path, new: Path, old: Path) -> None:
    """Put new in the place of target, with target's foreign files, and target at old."""
    there = target.iterdir() if target.is_dir() else ()
    strangers = [p.name for p in there if p.name not in (*PARTS, SETTINGS, MANIFEST)]
    try:
        for name in strangers:
            (target / name).rename(new / name)
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        for name in strangers:
            if (new / name).exists():
                (new / name).rename(target / name)
        raise


def load_flux(path: Folder, dtype: torch.dtype, options: dict[str, Any]) -> FluxPipeline:
    """Load the Flux pipeline that a folder or hub id holds, in the class that it names.

    Args:
        path: folder or hub id; of the hub's files only those of the components are fetched.
        dtype: of the weights.
        options: to diffusers' ``from_pretrained``.

    Raises:
        OSError: the folder is not there, or the hub is out of reach.
        ValueError: it is no Flux pipeline, or its weights are pickled, torn, foreign or incomplete.
    """
    folder = flux_folder(path, options)
    index = _read_index(folder)
    check_parts(folder, index, options)
    given = set(options)
    # from_pretrained wants to be told that what the folder leaves out shall be left out
    left_out = {k: None for k, v in index.items() if isinstance(v, list) and v[0] is None}
    options = {"use_safetensors": True, DTYPE: dtype, **left_out, **options}
    level = logging.get_verbosity()
    if index.get("vae") == OWN_VAE and "vae" not in options:
        vae = getattr(import_module(OWN_VAE[0]), OWN_VAE[1])
        options["vae"] = vae.from_pretrained(folder / "vae", **{DTYPE: dtype})
        logging.set_verbosity_error()  # it would warn that this is no AutoencoderKL
    try:
        flux = getattr(diffusers, index["_class_name"]).from_pretrained(folder, **options)
    finally:
        logging.set_verbosity(level)
    if options.get("device_map") is None:  # what is placed by it may wait on the meta device
        check_loaded({k: part for k, part in flux.components.items() if k not in given})
    for part in (flux, *flux.components.values()):
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
        if hasattr(part, "register_to_config"):
            # diffusers writes this into what is saved later: no folder of this machine
            part.register_to_config(_name_or_path="" if Path(path).exists() else str(path))
    return flux


def flux_folder(path: Folder, options: dict[str, Any]) -> Path:
    """The folder itself, or where the hub's client put the components of a hub id.

    Args:
        path: folder or hub id.
        options: of ``load_flux``; components that are None are not fetched.

    Raises:
        OSError: the folder is not there, or the hub is out of reach.
    """
    if not _is_hub_id(path):
        return require_folder(path, "flux")
    try:
        return Path(DiffusionPipeline.download(str(path), use_safetensors=True, **options))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise OSError(
            f"flux must be a folder or a hub id, got {str(path)!r}: there is no such folder here, "
            f"and the Hugging Face hub is out of reach or refuses it ({type(error).__name__})"
        ) from error


def _is_hub_id(path: Folder) -> bool:
    folder = Path(path)
    return not (folder.exists() or folder.is_absolute()) and str(path).count("/") == 1


def _read_index(folder: Path) -> dict[str, Any]:
    """The ``model_index.json`` of a Flux pipeline."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(f"flux must be a Flux pipeline, got {folder} without {file.name}")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        transformer = index["transformer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"flux: {file} describes no pipeline with a transformer") from error
    name = index.get("_class_name")
    if transformer != ["diffusers", "FluxTransformer2DModel"] or not hasattr(diffusers, str(name)):
        raise ValueError(
            f"flux must be a diffusers pipeline with a FluxTransformer2DModel, got {name!r} with "
            f"{transformer} in {folder}"
        )
    return index
