"""Saving and loading whole pipelines, and every way in which a folder can be wrong."""

import json
import os
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import FluxKontextPipeline

from sda_fast import pipeline_folder, weights
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import MANIFEST, SETTINGS, DecodeDefaults
from sda_fast.scenes.vae import SpaceToDepthVAE

from .tiny_encoders import SIZE
from .tiny_flux import tiny_flux_pipeline
from .tiny_pipeline import (
    CLIP_MEAN,
    CLOSE,
    DEFAULTS,
    make_adapter,
    make_embedding,
    make_picture,
    make_pipe,
)


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A folder of links to the saved model, for a test to break one of them."""
    for file in saved.rglob("*"):
        target = tmp_path / "copy" / file.relative_to(saved)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            os.link(file, target)
    return tmp_path / "copy"


def replace(file, data: bytes) -> None:
    file.unlink()  # the other name of the link keeps its bytes
    file.write_bytes(data)


def test_save_and_load(pipe, saved, tmp_path):
    names = {p.name for p in saved.iterdir()}
    assert names == {"flux", "adapter", "clip", "dino", SETTINGS, MANIFEST}
    loaded = SemanticPipeline.from_pretrained(saved)
    assert loaded.defaults == DEFAULTS
    assert loaded.adapter.encoder.clip_mean == pipe.adapter.encoder.clip_mean
    assert not any(p.requires_grad for p in loaded.flux.transformer.parameters())
    picture = make_picture(40, 24)
    want = pipe.reconstruct(picture, output="pt")
    torch.testing.assert_close(loaded.reconstruct(picture, output="pt"), want, **CLOSE)
    loaded.save_pretrained(tmp_path / "again")
    sums = [(f / MANIFEST).read_text().splitlines() for f in (saved, tmp_path / "again")]
    first, second = ([line for line in lines if line.endswith(".safetensors")] for lines in sums)
    assert first == second
    assert len(first) == 5


@pytest.mark.parametrize("arguments", [(), ("scenes",)])
def test_the_shipped_model(copy, tmp_path, monkeypatch, arguments):
    """It lies in the package, and must be what it was when it was shipped."""
    (tmp_path / "scenes").mkdir()
    weights = copy.rename(tmp_path / "scenes" / "weights")
    monkeypatch.setattr(pipeline_folder.resources, "files", lambda package: tmp_path)
    assert SemanticPipeline.from_pretrained(*arguments).defaults == DEFAULTS
    (weights / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=f"shipped model has no {MANIFEST}"):
        SemanticPipeline.from_pretrained(*arguments)


def test_saved_files_name_no_folder_of_this_machine(saved, tmp_path):
    SemanticPipeline.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.json"):
        assert str(saved.parent) not in file.read_text()


def test_load_from_separate_folders(pipe, saved, tmp_path):
    """As on the hub: each part in a repository of its own."""
    parts = {name: saved / name for name in ("flux", "adapter", "clip", "dino")}
    settings = {"size": SIZE, "clip_mean": CLIP_MEAN}
    loaded = SemanticPipeline.from_pretrained(**parts, encoder=settings)
    assert loaded.defaults.height == 1024
    picture = make_picture()
    want = pipe.reconstruct(picture, 32, 32, steps=2, output="pt")
    out = loaded.reconstruct(picture, 32, 32, steps=2, output="pt")
    torch.testing.assert_close(out, want, **CLOSE)
    blind = SemanticPipeline.from_pretrained(flux=parts["flux"], adapter=parts["adapter"])
    emb = make_embedding()
    out = blind.decode(emb, 32, 32, 2, output="pt")
    torch.testing.assert_close(out, pipe.decode(emb, output="pt"), **CLOSE)
    with pytest.raises(ValueError, match="no encoder"):
        blind.encode(picture)
    blind.save_pretrained(tmp_path / "blind")
    again = SemanticPipeline.from_pretrained(tmp_path / "blind")
    assert again.adapter.encoder is None
    # a part in place of the folder's own, another dtype
    mixed = SemanticPipeline.from_pretrained(saved, dino=parts["dino"], dtype=torch.bfloat16)
    assert mixed.flux.transformer.dtype == mixed.adapter.dtype == torch.bfloat16
    assert mixed.adapter.encoder.dino.dtype == torch.bfloat16


def test_class_and_vae_come_from_the_folder(tmp_path, caplog):
    """Another Flux pipeline, and the space-to-depth VAE that diffusers does not know."""
    flux = tiny_flux_pipeline(FluxKontextPipeline, in_channels=48)
    components = {**flux.components, "vae": SpaceToDepthVAE()}
    flux = FluxKontextPipeline(**components)
    pipe = SemanticPipeline(flux, make_adapter(), DecodeDefaults(8, 8))
    assert pipe.patch == 4
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "flux" / "model_index.json").read_text())
    assert index["vae"] == ["sda_fast.scenes.vae", "SpaceToDepthVAE"]
    loaded = SemanticPipeline.from_pretrained(tmp_path / "model")
    assert "Expected types for vae" not in caplog.text
    assert type(loaded.flux) is FluxKontextPipeline
    assert type(loaded.flux.vae) is SpaceToDepthVAE
    options = {"steps": 1, "output": "pt"}
    loaded.flux.set_progress_bar_config(disable=True)
    source = torch.rand(1, 3, 8, 8)
    out = loaded.decode(make_embedding(1), image=source, **options)
    want = pipe.decode(make_embedding(1), image=source, **options)
    torch.testing.assert_close(out, want, **CLOSE)
    assert out.shape == (1, 3, 8, 8)


def test_saving_over(pipe, saved, copy, tmp_path, monkeypatch):
    (copy / "adapter" / "stray.txt").write_text("old")
    pipe.save_pretrained(copy)  # one saved before is replaced, as a whole
    assert not (copy / "adapter" / "stray.txt").exists()
    assert (copy / MANIFEST).read_bytes() == (saved / MANIFEST).read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(pipe.adapter.encoder.dino, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        pipe.save_pretrained(copy)
    SemanticPipeline.from_pretrained(copy)
    assert {p.name for p in tmp_path.iterdir()} == {"copy"}  # no leavings


def test_saving_over_keeps_files_of_the_user(pipe, copy):
    (copy / "README.md").write_text("mine")
    (copy / "notes").mkdir()
    (copy / "notes" / "a.txt").write_text("too")
    pipe.save_pretrained(copy)
    assert (copy / "README.md").read_text() == "mine"
    assert (copy / "notes" / "a.txt").read_text() == "too"
    assert "README" not in (copy / MANIFEST).read_text()
    SemanticPipeline.from_pretrained(copy)


@pytest.mark.parametrize("failing", ["new", "old", "README.md"])
def test_a_failed_swap_leaves_the_old_model(pipe, copy, tmp_path, monkeypatch, failing):
    """A rename fails, of the new folder, of the old one, or of a file that is carried over."""
    (copy / "README.md").write_text("mine")
    before = {p.relative_to(copy) for p in copy.rglob("*")}
    rename = Path.rename

    def flaky(self, target):
        if failing in (self.name, Path(target).name):
            raise OSError("I/O error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", flaky)
        with pytest.raises(OSError, match="I/O error"):
            pipe.save_pretrained(copy)
    assert {p.relative_to(copy) for p in copy.rglob("*")} == before
    SemanticPipeline.from_pretrained(copy)
    assert {p.name for p in tmp_path.iterdir()} == {"copy"}  # no leavings


def test_an_old_model_that_cannot_be_put_back_is_kept(pipe, copy, tmp_path, monkeypatch):
    rename = Path.rename

    def flaky(self, target):
        if self.name in ("new", "old"):
            raise OSError("I/O error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", flaky)
        with pytest.raises(OSError, match="I/O error"):
            pipe.save_pretrained(copy)
    (old,) = tmp_path.glob(".copy.*/old")
    SemanticPipeline.from_pretrained(old)


@pytest.mark.parametrize("path", [".", ".."])
def test_the_working_directory_is_not_replaced(pipe, tmp_path, monkeypatch, path):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / ("" if path == "." else "below"))
    (tmp_path / "here" / SETTINGS).write_text("{}")
    with pytest.raises(ValueError, match="path must not be the working directory"):
        pipe.save_pretrained(path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_saving_over_something_else(pipe, tmp_path, kind):
    target = tmp_path / "thesis"
    if kind == "file":
        target.write_text("chapter 1")
    else:
        target.mkdir()
        (target / "chapter").write_text("1")
    with pytest.raises(ValueError, match=r"path must be new, empty or a saved pipeline.*thesis"):
        pipe.save_pretrained(target)
    assert (target if kind == "file" else target / "chapter").read_text() in ("chapter 1", "1")


def test_a_flipped_bit_is_noticed(copy):
    file = copy / "adapter" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    replace(file, bytes(data))
    with pytest.raises(
        ValueError, match=f"diffusion_pytorch_model.safetensors differs.*{MANIFEST}"
    ):
        SemanticPipeline.from_pretrained(copy)
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        SemanticPipeline.from_pretrained(copy)


BREAKAGES = {
    "no settings": (SETTINGS, None, FileNotFoundError, f"without {SETTINGS}"),
    "foreign settings": (SETTINGS, b'{"a": 1}', ValueError, "settings of a SemanticPipeline"),
    "no model index": ("flux/model_index.json", None, FileNotFoundError, "flux must be a Flux"),
    "another pipeline": (
        "flux/model_index.json",
        b'{"_class_name": "FluxPipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}',
        ValueError,
        "FluxTransformer2DModel, got 'FluxPipeline' with .*SD3",
    ),
    "torn transformer": (
        "flux/transformer/diffusion_pytorch_model.safetensors",
        b"\x10\x00",
        ValueError,
        "truncated",
    ),
    "pickled transformer": (
        "flux/transformer/diffusion_pytorch_model.bin",
        b"pickle",
        ValueError,
        "pickled",
    ),
    "another adapter": ("adapter/config.json", b'{"_class_name": "T2IAdapter"}', ValueError, "T2I"),
    "no encoder": ("dino/config.json", None, FileNotFoundError, "dino must be a model folder"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_folders(copy, breakage):
    name, data, error, message = BREAKAGES[breakage]
    (copy / MANIFEST).unlink()
    file = copy / name
    if name.endswith(".bin"):
        file.with_suffix(".safetensors").unlink()
    else:
        file.unlink()
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(error, match=message):
        SemanticPipeline.from_pretrained(copy)


def test_dtype_by_either_name(saved):
    loaded = SemanticPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert loaded.flux.transformer.dtype == loaded.flux.vae.dtype == torch.bfloat16
    assert loaded.adapter.dtype == loaded.adapter.encoder.dino.dtype == torch.bfloat16
    for name in ("dtype", "torch_dtype"):
        with pytest.raises(ValueError, match=r"dtype must be a torch\.dtype, got 'bfloat16'"):
            SemanticPipeline.from_pretrained(saved, **{name: "bfloat16"})


@pytest.mark.parametrize("part", ["path", "adapter", "clip", "dino"])
def test_options_of_the_hub_that_reach_flux_alone(saved, part):
    arguments = {"path": saved, part: "some-one/model"}
    with pytest.raises(
        ValueError, match=rf"revision, token must come .*'some-one/model' as {part}"
    ):
        SemanticPipeline.from_pretrained(**arguments, revision="v2", token="t")


@pytest.mark.parametrize("part", ["path", "adapter", "clip"])
def test_local_files_only_reaches_every_part(saved, monkeypatch, part):
    asked = []

    def absent(name, **options):
        asked.append(options["local_files_only"])
        raise OSError

    monkeypatch.setattr(weights, "snapshot_download", absent)
    with pytest.raises(OSError, match=f"{part} must be a folder or a hub id"):
        SemanticPipeline.from_pretrained(
            **{"path": saved, part: "some-one/model"}, local_files_only=True
        )
    assert asked == [True]


def test_wrong_arguments_to_from_pretrained(saved, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"clip together with dino.*got flux, adapter, clip"):
        SemanticPipeline.from_pretrained(
            flux=saved / "flux", adapter=saved / "adapter", clip=saved / "clip"
        )
    with pytest.raises(ValueError, match=r"flux and adapter.*got flux"):
        SemanticPipeline.from_pretrained(flux=saved / "flux")
    with pytest.raises(FileNotFoundError, match=r"path must be a folder.*nowhere"):
        SemanticPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"flux must be a folder.*nowhere"):
        SemanticPipeline.from_pretrained(saved, flux=tmp_path / "nowhere")
    (tmp_path / SETTINGS).write_bytes((saved / SETTINGS).read_bytes())
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(FileNotFoundError, match="adapter must be a folder"):
        SemanticPipeline.from_pretrained(tmp_path.name)  # a relative path
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"flux must be a folder or a hub id, got 'some-one/flux'"):
        SemanticPipeline.from_pretrained(saved, flux="some-one/flux")
    with pytest.raises(OSError, match=r"path must be a folder or a hub id, got 'some-one/model'"):
        SemanticPipeline.from_pretrained("some-one/model")
