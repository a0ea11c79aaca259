"""A run's adapter as a folder: the averaged weights, bit for bit, and whose terms hold."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from sda_fast.adapter import SemanticAdapter
from train.__main__ import build_stage
from train.checkpoint import write_checkpoint
from train.config import describe, override
from train.export import evaluation, export_run
from train.loop import train
from train.model_card import model_card
from train.ranks import Ranks
from train.recipes import RECIPES
from train.report import JsonLines

from .tiny_encoders import same_state, tiny_adapter, tiny_encoder

SHIPPED = "sda_fast/scenes/weights"


def state_of(adapter, **opened):
    """Tensors of a checkpoint whose average is not its model."""
    ema = {f"ema/adapter.{name}": t for name, t in adapter.state_dict().items()}
    model = {f"model/adapter.{name}": t + 1 for name, t in adapter.state_dict().items()}
    return ema | model | {f"ema/encoder.{name}": t for name, t in opened.items()}


def meta_of(recipe, step, adapter, **changes):
    config = json.loads(describe(RECIPES[recipe]())) | changes
    arguments = {key: adapter.config[key] for key in ("tokens_per_node", "in_features", "width")}
    arguments |= {key: adapter.config[key] for key in ("num_layers", "num_heads", "out_features")}
    arguments["tokens_per_node"] = list(arguments["tokens_per_node"])
    stage = config["stage"]
    about = {"recipe": recipe, "stage": stage, "step": step, "adapter": arguments}
    return about | {"config": config}


def adapter_of(seed, **options):
    torch.manual_seed(seed)
    return tiny_adapter(**options)


@pytest.fixture(scope="module")
def encoder():
    encoder = tiny_encoder()
    encoder.unfreeze_last(2)
    with torch.no_grad():
        for value in encoder.trained_layers().values():
            value.add_(0.5)
    return encoder


@pytest.fixture
def run(tmp_path, encoder):
    """A run of two checkpoints, with DINOv2's last two layers open."""
    folder = tmp_path / "phase4-768"
    for step, seed in ((10, 1), (20, 2)):
        adapter = adapter_of(seed)
        tensors = state_of(adapter, **encoder.trained_layers())
        write_checkpoint(folder / "checkpoints", tensors, meta_of("phase4-768", step, adapter))
    log = JsonLines(folder)
    for step in (8, 16, 24):
        log.log({"step": step, "loss": 1.0})
        log.log({"step": step, "eval/loss": step / 100, "eval/mean_cosine": 0.125})
    log.close()
    return folder


def test_the_newest_average_is_exported_with_the_layers_that_were_opened(run, encoder):
    target = export_run(run)
    assert target == run / "export" / "adapter"
    adapter = SemanticAdapter.from_pretrained(target)
    assert same_state(adapter, adapter_of(2))
    fresh = tiny_encoder()
    adapter.set_encoder(fresh)
    assert same_state(fresh, encoder)
    assert not any(file.name.startswith(".") for file in target.iterdir())


def test_an_export_replaces_the_one_before_and_no_more(run, tmp_path):
    target = tmp_path / "adapter"
    export_run(run, target)
    (target / "mine.txt").write_text("mine")
    closed = tmp_path / "closed"
    adapter = tiny_adapter()
    meta = meta_of("phase3-128", 30, adapter)
    write_checkpoint(closed / "checkpoints", state_of(adapter), meta)
    export_run(closed, target)
    assert sorted(file.name for file in target.iterdir()) == [
        "README.md", "config.json", "diffusion_pytorch_model.safetensors", "mine.txt",
    ]  # fmt: skip


def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_exported(run):
    state = next((run / "checkpoints" / "step-000020").glob("*.safetensors"))
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    told = []
    adapter = SemanticAdapter.from_pretrained(export_run(run, warn=told.append))
    assert same_state(adapter, adapter_of(1))
    assert len(told) == 1
    assert "step-000020 is passed over" in told[0]


def test_the_card_names_licences_models_and_what_was_measured(run):
    path = export_run(run) / "README.md"
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "flux-1-dev-non-commercial-license"
    assert data["library_name"] == "diffusers"
    assert data["base_model"] == [
        "black-forest-labs/FLUX.1-dev", "apple/DFN5B-CLIP-ViT-H-14-378", "facebook/dinov2-large",
    ]  # fmt: skip
    for part in (
        "Non-Commercial License", "apple-amlr", "InternViT, if that is the encoder | MIT",
        "| DINOv2 | Apache-2.0 |", "DINOv2's last layers", "no commercial use",
        "step 20 of 20,000, 5,120 pictures", "tokens\\_per\\_node | 4, 2 |", "resolution | 768",
        "At step 16,", "| loss | 0.16 |", "| mean cosine | 0.125 |",
    ):  # fmt: skip
        assert part in card.text, part
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) == 6
    compile(code, "usage", "exec")


def test_a_card_holds_no_path_and_no_markup_of_strangers(tmp_path):
    adapter = tiny_adapter()
    clip = tmp_path / "clip"
    clip.mkdir()
    changes = {"clip": str(clip), "dino": "facebook/dinov2-giant", "flux": "/srv/flux"}
    meta = meta_of("phase3-128", 5, adapter, data=str(tmp_path), out_dir="/srv/runs", **changes)
    text = model_card(meta | {"recipe": "a|b\n<script>"}, None, opened=False)
    data = ModelCard(text).data.to_dict()
    assert data["base_model"][1:] == ["apple/DFN5B-CLIP-ViT-H-14-378", "facebook/dinov2-giant"]
    assert str(tmp_path) not in text
    assert "/srv" not in text
    assert "# a\\|b \\<script\\>" in text
    assert "Not evaluated." in text
    assert "last layers" not in text


def test_the_evaluation_is_none_of_the_future(run):
    assert evaluation(run, 7) is None
    assert evaluation(run, 15) == (8, {"loss": 0.08, "mean_cosine": 0.125})
    assert evaluation(run / "none", 15) is None


def test_an_export_of_a_finished_run_is_what_the_run_exported(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    options = [
        "rehearsal=small", "steps=2", "warmup_steps=1", "batch_size=2", "micro_batch=2",
        "log_every=1", "checkpoint_every=1", "eval_every=2", "eval_pictures=2", "precision=fp32",
        "decoder=stock", "open_layers=1", "resolution=64", "workers=0", f"data={pictures}",
        f"out_dir={tmp_path}",
    ]  # fmt: skip
    config = override(RECIPES["rehearse"](), options)
    train(config, build_stage(config, Ranks()))
    found, own = export_run(config.folder, tmp_path / "found"), config.folder / "export" / "adapter"
    names = {file.name for file in own.iterdir()}
    assert "encoder_layers.safetensors" in names
    assert names | {"README.md"} == {file.name for file in found.iterdir()}
    for name in names:
        assert (found / name).read_bytes() == (own / name).read_bytes()
    card = ModelCard.load(found / "README.md")
    assert "A rehearsal" in card.text
    assert "| width | 32 |" in card.text


def test_a_run_of_scenes_is_free_of_foreign_terms(tmp_path):
    sizes = {"tokens_per_node": (16,), "in_features": 192, "out_features": 96}
    adapter = adapter_of(0, **sizes)
    meta = meta_of("scenes-16", 7, adapter)
    write_checkpoint(tmp_path / "checkpoints", state_of(adapter), meta)
    target = export_run(tmp_path)
    card = ModelCard.load(target / "README.md")
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert "base_model" not in card.data.to_dict()
    assert "no foreign\nweights" in card.text
    assert "FLUX.1" not in card.text
    # what the card says of its use, with the encoders that are shipped
    code = card.text.partition("```python\n")[2].partition("```")[0]
    for name, path in (("path/to/this", target), ("clip", SHIPPED), ("dino", SHIPPED)):
        code = code.replace(f'"{name}"', f'"{path if path is target else f"{path}/{name}"}"')
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    found = {}
    exec(code.replace("a.png", f"{tmp_path}/a.png"), found)
    assert found["emb"].tokens.shape == (1, 16, 96)


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path, run):
    target = tmp_path / "to"
    with pytest.raises(FileNotFoundError, match=r"run must be the folder of a run, got .*none"):
        export_run(tmp_path / "none", target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="run must hold a whole checkpoint"):
        export_run(tmp_path / "empty", target)
    other = tmp_path / "scenes-dino"
    meta = {"recipe": "scenes-dino", "stage": "dino", "step": 3, "config": {}}
    write_checkpoint(other / "checkpoints", {"ema/vision.w": torch.zeros(2)}, meta)
    with pytest.raises(
        ValueError, match=r"flux, edit or edit-pictures, got .*dino of stage 'dino'"
    ):
        export_run(other, target)
    foreign = tmp_path / "foreign"
    wide = meta_of("phase3-128", 4, tiny_adapter(width=64))
    write_checkpoint(foreign / "checkpoints", state_of(tiny_adapter()), wide)
    with pytest.raises(ValueError, match="holds no weights of its own adapter"):
        export_run(foreign, target)
    assert not target.exists()
    weights = export_run(run) / "diffusion_pytorch_model.safetensors"
    assert load_file(weights)["qformer.queries"].dtype == torch.float32
