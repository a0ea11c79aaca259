import json
import os

import pytest
import torch
from diffusers import FluxTransformer2DModel, ModelMixin

from sda_fast.adapter import SemanticAdapter
from sda_fast.weights import DTYPE, read_safetensors, write_safetensors
from tests.tiny_encoders import FEATURES, same_state, tiny_adapter, tiny_encoder


def test_round_trip(tmp_path):
    adapter = tiny_adapter(pooled_features=5, cross_attention_every=2, self_attention_rope=True)
    adapter.pooled.normal_()
    adapter.save_pretrained(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = SemanticAdapter.from_pretrained(tmp_path / "a")
    assert same_state(loaded, adapter)
    assert not loaded.training
    features = torch.randn(1, 12, FEATURES)
    assert torch.equal(loaded(features, (3, 4)), adapter(features, (3, 4)))
    loaded.save_pretrained(tmp_path / "b")
    for name in os.listdir(tmp_path / "a"):
        first, second = (tmp_path / folder / name for folder in "ab")
        if name.endswith(".json"):
            configs = [json.loads(path.read_text()) for path in (first, second)]
            assert str(tmp_path) not in second.read_text()
            configs[1].pop("_name_or_path")
            assert configs[0] == configs[1]
        else:
            assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loads_in_bf16(tmp_path, argument, low_cpu_mem_usage):
    adapter = tiny_adapter(pooled_features=5)
    adapter.pooled.normal_()
    adapter.save_pretrained(tmp_path)
    loaded = SemanticAdapter.from_pretrained(
        tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **{argument: torch.bfloat16}
    )
    assert same_state(loaded, adapter.to(torch.bfloat16))
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_names_the_dtype_as_this_diffusers_does(tmp_path, monkeypatch, argument):
    class Seen(Exception):
        pass

    def record(path, **kwargs):
        raise Seen({k: v for k, v in kwargs.items() if "dtype" in k})

    tiny_adapter().save_pretrained(tmp_path)
    monkeypatch.setattr(ModelMixin, "from_pretrained", record)
    with pytest.raises(Seen) as seen:
        SemanticAdapter.from_pretrained(tmp_path, **{argument: torch.float16})
    assert seen.value.args == ({DTYPE: torch.float16},)


def opened_adapter(**options):
    adapter = tiny_adapter(**options)
    adapter.set_encoder(tiny_encoder())
    adapter.encoder.unfreeze_last(1)
    return adapter


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("part", ["config", "weights", "encoder"])
def test_a_failed_save_leaves_the_old_one_whole(tmp_path, monkeypatch, part):
    opened_adapter().save_pretrained(tmp_path)
    before, called = contents(tmp_path), []

    def fail(*_, **__):
        called.append(part)
        raise OSError(28, "No space left on device")

    target = {
        "config": "diffusers.configuration_utils.ConfigMixin.save_config",
        "weights": "safetensors.torch.save_file",
        "encoder": "sda_fast.adapter.write_safetensors",
    }[part]
    monkeypatch.setattr(target, fail)
    with pytest.raises(OSError, match="No space left"):
        opened_adapter(pooled_features=3).save_pretrained(tmp_path)
    assert called == [part]
    assert contents(tmp_path) == before


def test_a_save_cut_off_while_moving_is_never_a_mix(tmp_path, monkeypatch):
    opened_adapter().save_pretrained(tmp_path)
    replace, moved = os.replace, []

    def stop(source, target):
        if "partial" in str(source) and str(target).startswith(str(tmp_path / "diffusion")):
            moved.append(target)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        opened_adapter().save_pretrained(tmp_path)
    assert moved
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        SemanticAdapter.from_pretrained(tmp_path)


def test_a_save_replaces_a_sharded_one_and_keeps_other_files(tmp_path):
    tiny_adapter().save_pretrained(tmp_path, max_shard_size=20_000)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert same_shapes(SemanticAdapter.from_pretrained(tmp_path), tiny_adapter())
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "other").mkdir()
    adapter = tiny_adapter()
    adapter.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "other",
    ]
    assert same_state(SemanticAdapter.from_pretrained(tmp_path), adapter)
    tiny_adapter().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def same_shapes(a, b):
    shapes = ({k: v.shape for k, v in m.state_dict().items()} for m in (a, b))
    return next(shapes) == next(shapes)


def test_a_hub_out_of_reach_does_not_cost_the_save(tmp_path, monkeypatch):
    def refuse(self, repo_id, **options):
        raise OSError(f"no way to {repo_id} as {options['commit_message']}")

    monkeypatch.setattr(SemanticAdapter, "push_to_hub", refuse)
    adapter = tiny_adapter()
    with pytest.raises(OSError, match="no way to mine as first"):
        adapter.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="first")
    assert same_state(SemanticAdapter.from_pretrained(tmp_path / "mine"), adapter)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", "32", "width must be an integer >= 1, got '32'"),
        ("num_layers", 2.0, r"num_layers must be an integer >= 1, got 2\.0"),
        ("pooled_features", "5", "pooled_features, unless None, must be an integer >= 1, got '5'"),
        ("cross_attention_rope", "no", "cross_attention_rope must be True or False, got 'no'"),
        ("tokens_per_node", None, "tokens_per_node must be a tuple of 1 to 6 integers, got None"),
    ],
)
def test_names_the_folder_and_key_of_a_bad_config(tmp_path, key, value, message):
    tiny_adapter().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"adapter: {tmp_path}/config\.json: {message}"):
        SemanticAdapter.from_pretrained(tmp_path)


def test_loads_from_a_subfolder(tmp_path):
    adapter = tiny_adapter()
    adapter.save_pretrained(tmp_path / "adapter")
    assert same_state(SemanticAdapter.from_pretrained(tmp_path, subfolder="adapter"), adapter)


def test_opened_encoder_layers_travel_with_the_adapter(tmp_path):
    adapter = tiny_adapter()
    adapter.set_encoder(tiny_encoder())
    adapter.encoder.unfreeze_last(1)
    with torch.no_grad():
        for parameter in adapter.encoder.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    adapter.save_pretrained(tmp_path / "a")
    image = torch.rand(1, 3, 32, 32)
    wanted = adapter.encode(image).tokens

    loaded = SemanticAdapter.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")  # with no encoder at hand
    again = SemanticAdapter.from_pretrained(tmp_path / "b")
    again.set_encoder(tiny_encoder())
    assert torch.equal(again.encode(image).tokens, wanted)
    again.save_pretrained(tmp_path / "c")
    name = "encoder_layers.safetensors"
    contents = {(tmp_path / folder / name).read_bytes() for folder in "abc"}
    assert len(contents) == 1

    tiny_adapter().save_pretrained(tmp_path / "a")  # nothing open: no stale file stays
    assert not (tmp_path / "a" / name).exists()


def test_refuses_another_models_config(tmp_path):
    tiny_adapter().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_class_name": FluxTransformer2DModel.__name__}))
    told = "must hold the model SemanticAdapter, got the config of 'FluxTrans"
    with pytest.raises(ValueError, match=told):
        SemanticAdapter.from_pretrained(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        SemanticAdapter.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        SemanticAdapter.from_pretrained(tmp_path)


def test_refuses_weights_it_cannot_trust(tmp_path):
    tiny_adapter().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for torn in (whole[:-8], whole[:20], b"", b"<html>not weights</html>"):
        weights.write_bytes(torn)
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetens"):
            SemanticAdapter.from_pretrained(tmp_path)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"pickled weights diffusion_pytorch_model\.bin"):
        SemanticAdapter.from_pretrained(tmp_path)
    write_safetensors(tmp_path / "encoder_layers.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"pickled weights diffusion_pytorch_model\.bin"):
        SemanticAdapter.from_pretrained(tmp_path)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter must hold \*\.safetensors"):
        SemanticAdapter.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safe_serialization must stay True"):
        tiny_adapter().save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_refuses_weights_that_do_not_fit_the_config(tmp_path, low_cpu_mem_usage):
    tiny_adapter(num_layers=1).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for change in ({"num_layers": 2}, {"width": 64}, {"pooled_features": 3}):
        tiny_adapter(num_layers=1).save_pretrained(tmp_path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(
            ValueError, match=r"adapter: .* holds weights that do not fit its config"
        ):
            SemanticAdapter.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_names_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter must be a folder, got .*gone"):
        SemanticAdapter.from_pretrained(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="adapter must be a folder, got the file"):
        SemanticAdapter.from_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="must be a folder or a hub id, got None"):
        SemanticAdapter.from_pretrained(None)
    with pytest.raises(OSError, match="adapter must be a folder or a hub id, got 'no-one/none'"):
        SemanticAdapter.from_pretrained("no-one/none", local_files_only=True)


def test_a_new_encoder_takes_over_the_trained_layers():
    adapter = tiny_adapter()
    adapter.set_encoder(tiny_encoder())
    adapter.encoder.unfreeze_last(1)
    with torch.no_grad():
        for parameter in adapter.encoder.parameters():
            parameter.mul_(1.5 if parameter.requires_grad else 1)
    image = torch.rand(1, 3, 32, 32)
    wanted = adapter.encode(image).tokens
    for encoder in (tiny_encoder(), None, tiny_encoder()):
        adapter.set_encoder(encoder)
    assert torch.equal(adapter.encode(image).tokens, wanted)


def test_a_hub_id_is_downloaded_without_pickles(tmp_path, monkeypatch):
    adapter, asked = tiny_adapter(), []
    adapter.save_pretrained(tmp_path / "snapshot")

    def download(repo_id, allow_patterns, local_files_only):
        asked.append((repo_id, local_files_only))
        assert not any(pattern.endswith(("bin", "pt", "ckpt")) for pattern in allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("sda_fast.weights.snapshot_download", download)
    loaded = SemanticAdapter.from_pretrained("owner/name")
    assert same_state(loaded, adapter)
    assert asked == [("owner/name", False)]
    assert loaded.config["_name_or_path"] == "owner/name"


def test_write_safetensors_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.arange(6).view(2, 3).T})
    assert torch.equal(read_safetensors(path)["x"], torch.arange(6).view(2, 3).T)
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_safetensors(path, {"x": shared, "y": shared})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert "x" in read_safetensors(path)
    with pytest.raises(ValueError, match=r"must be \.safetensors .* got .*a\.pt"):
        write_safetensors(tmp_path / "a.pt", {})
    with pytest.raises(ValueError, match=r"no pickle is read"):
        read_safetensors(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match=r"no such weights file: .*b\.safetensors"):
        read_safetensors(tmp_path / "b.safetensors")
