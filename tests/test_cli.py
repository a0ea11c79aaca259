"""The command line: what it writes, what it prints where, and its exit codes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy
from tests.command_line import (
    BAD_INPUT,
    FAILED,
    lines,
    load_model,
    pixels,
    run,
    save_model,
    write_noise,
)
from tests.tiny_scenes import STEPS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory)


@pytest.fixture(scope="module")
def pipe(model):
    return load_model(model)


@pytest.fixture
def pictures(tmp_path):
    """Two pictures, the second twice as wide as high."""
    sizes = {"a.png": (32, 32), "b.png": (48, 24)}
    return [write_noise(tmp_path / name, size) for name, size in sizes.items()]


def test_reconstruct_writes_what_the_pipeline_draws_and_prints_paths_alone(
    model, pipe, pictures, tmp_path
):
    out = tmp_path / "new" / "out"
    found = lines(run("reconstruct", *pictures, "--model", model, "--out", out, "--seed", 3))
    assert found == [str(out / "a.rebuilt.png"), str(out / "b.rebuilt.png")]
    for path, expected in zip(found, pipe.reconstruct(pictures, seed=3), strict=True):
        assert pixels(Image.open(path)) == pixels(expected)
    assert Image.open(found[1]).size == (44, 24)  # the aspect ratio at the model's area
    assert sorted(p.name for p in out.iterdir()) == ["a.rebuilt.png", "b.rebuilt.png"]


def test_every_sampling_option_reaches_the_decoder(model, pipe, pictures, tmp_path):
    options = {"height": 16, "width": 24, "steps": STEPS + 1, "guidance": 2.0, "seed": 5}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    flags += ["--rule", "isolated", "--model", model, "--out", tmp_path / "out"]
    [path] = lines(run("reconstruct", pictures[0], *flags))
    [expected] = pipe.reconstruct(pictures[0], rule="isolated", **options)
    assert pixels(Image.open(path)) == pixels(expected)


def test_encode_then_decode(model, pipe, pictures, tmp_path):
    out = tmp_path / "out"
    [path] = lines(run("encode", pictures[1], "--model", model, "--out", out))
    emb = SemanticEmbedding.load(path)
    assert torch.equal(emb.tokens, pipe.encode(pictures[1]).tokens)
    [decoded] = lines(run("decode", path, "--model", model, "--out", out))
    assert decoded == str(out / "b.decoded.png")
    assert pixels(Image.open(decoded)) == pixels(pipe.decode(emb)[0])


def test_decode_reads_the_first_levels_alone(model, pipe, pictures, tmp_path):
    emb = pipe.encode(pictures[0])
    emb.save(tmp_path / "a.safetensors")
    flags = "--model", model, "--out", tmp_path
    [path] = lines(run("decode", tmp_path / "a.safetensors", "--levels", 2, *flags))
    [expected] = pipe.decode(emb.truncate(2))
    assert pixels(Image.open(path)) == pixels(expected)
    assert pixels(expected) != pixels(pipe.decode(emb)[0])


def test_decode_numbers_the_pictures_of_a_batch(model, pipe, pictures, tmp_path):
    file = tmp_path / "both.safetensors"
    emb = pipe.encode(pictures)
    emb.save(file)
    found = lines(run("decode", file, "--model", model, "--out", tmp_path))
    assert [path.rpartition("/")[2] for path in found] == [
        "both.decoded.png",
        "both-2.decoded.png",
    ]
    for path, expected in zip(found, pipe.decode(emb), strict=True):
        assert pixels(Image.open(path)) == pixels(expected)


def test_files_of_one_name_do_not_replace_each_other(model, pictures, tmp_path):
    twin = tmp_path / "other" / "a.png"
    twin.parent.mkdir()
    Image.open(pictures[1]).save(twin)
    found = lines(run("encode", pictures[0], twin, "--model", model, "--out", tmp_path))
    assert [path.rpartition("/")[2] for path in found] == ["a.safetensors", "a-2.safetensors"]
    first, second = (SemanticEmbedding.load(path) for path in found)
    assert not torch.equal(first.tokens, second.tokens)


def test_info(model, pipe, pictures, tmp_path):
    file = tmp_path / "e.safetensors"
    pipe.encode(pictures).save(file)
    about = json.loads(run("info", file, "--json").stdout)
    assert about["kind"] == "embedding"
    assert (about["pictures"], about["channels"], about["positions"]) == (2, 16, 28)
    assert Hierarchy(about["tokens_per_node"]) == pipe.adapter.tree

    weights = next((model / "adapter").glob("*.safetensors"))
    folder, single = (
        json.loads(run("info", p, "--json").stdout) for p in (weights, model / "adapter")
    )
    assert folder == single
    expected = sum(p.numel() for p in pipe.adapter.state_dict().values())
    assert (folder["kind"], folder["parameters"]) == ("adapter", expected)

    about = json.loads(run("info", model, "--json").stdout)
    assert (about["kind"], about["decode"]["steps"]) == ("pipeline", STEPS)
    assert "positions        28" in run("info", file).stdout


@pytest.mark.parametrize("kind", ["missing", "flux", "foreign", "pickle"])
def test_info_refuses_what_it_does_not_know(model, tmp_path, kind):
    foreign = tmp_path / "x.safetensors"
    foreign.write_bytes((model / "clip" / "model.safetensors").read_bytes())
    (tmp_path / "x.bin").write_bytes(b"\x80\x04")
    path = {
        "missing": tmp_path / "none",
        "flux": model / "flux" / "transformer",
        "foreign": foreign,
        "pickle": tmp_path / "x.bin",
    }[kind]
    result = run("info", path)
    assert result.exit_code == BAD_INPUT
    assert result.stdout == ""
    assert "error:" in result.stderr


@pytest.mark.parametrize("field", ["tokens_per_node", "width"])
def test_info_names_what_an_adapter_config_lacks(model, tmp_path, field):
    shutil.copytree(model / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "config.json"
    config = json.loads(file.read_text())
    del config[field]
    file.write_text(json.dumps(config))
    result = run("info", tmp_path / "adapter")
    assert result.exit_code == BAD_INPUT
    assert f"without {field}" in result.stderr


@pytest.mark.parametrize("command", ["reconstruct", "encode", "interpolate"])
@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_out_must_be_a_folder(command, below, pictures, tmp_path):
    (tmp_path / "file.png").write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    result = run(command, *pictures, "--out", tmp_path / "file.png" / below)
    assert result.exit_code == BAD_INPUT
    assert "--out must be a folder" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file.png").read_bytes() == b"mine"


def bad_command(kind, model, pictures, tmp_path):
    good, torn = pictures[0], tmp_path / "torn.jpg"
    Image.open(good).resize((200, 200)).save(torn)
    torn.write_bytes(torn.read_bytes()[:900])
    emb = tmp_path / "torn.safetensors"
    emb.write_bytes(b"\x40" + bytes(30))
    whole = tmp_path / "whole.safetensors"
    SemanticEmbedding(torch.zeros(1, 28, 16), Hierarchy((4, 2, 1))).save(whole)
    return {
        "no picture": (["reconstruct", good, tmp_path / "none.png"], "none.png"),
        "torn picture": (["encode", good, torn], "torn.jpg"),
        "torn embedding": (["decode", emb], "torn.safetensors"),
        "no model": (["encode", good, "--model", tmp_path / "nowhere"], "nowhere"),
        "rule": (["reconstruct", good, "--rule", "global", "--model", model], "global"),
        "height alone": (["reconstruct", good, "--height", 32, "--model", model], "width"),
        "odd size": (
            ["reconstruct", good, "--height", 30, "--width", 32, "--model", model],
            "30",
        ),
        "node": (["interpolate", good, good, "--node", "/9", "--model", model], "/9"),
        "mode": (["interpolate", good, good, "--mode", "cut", "--model", model], "cut"),
        "levels": (["decode", whole, "--levels", 4, "--model", model], "levels must be 1 to 3"),
        "steps": (["reconstruct", good, "--steps", 0], "--steps"),
        "one frame": (["interpolate", good, good, "--frames", 1], "--frames"),
        "no command": (["rebuild", good], "rebuild"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "no picture",
        "torn picture",
        "torn embedding",
        "no model",
        "rule",
        "height alone",
        "odd size",
        "node",
        "mode",
        "levels",
        "steps",
        "one frame",
        "no command",
    ],
)
def test_bad_input_is_2_with_a_message_and_writes_nothing(kind, model, pictures, tmp_path):
    command, named = bad_command(kind, model, pictures, tmp_path)
    out = tmp_path / "out"
    result = run(*command, *(["--out", out] if kind != "no command" else []))
    assert result.exit_code == BAD_INPUT
    assert result.stdout == ""
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize(
    "error", [NotImplementedError("kernel not built yet"), OSError("disk full"), MemoryError()]
)
def test_work_that_fails_is_1_with_a_message(error, pictures, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr("sda_fast.cli.commands.load_pipeline", fail)
    result = run("reconstruct", pictures[0], "--out", tmp_path / "out")
    assert result.exit_code == FAILED
    assert (str(error) or "MemoryError") in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_keeps_its_traceback(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("sda_fast.cli.commands.load_pipeline", lambda *args: {}["missing"])
    result = run("reconstruct", pictures[0], "--out", tmp_path / "out")
    assert isinstance(result.exception, KeyError)


def test_an_input_is_never_overwritten(model, pictures, tmp_path):
    before = pictures[0].read_bytes()
    (tmp_path / "a.rebuilt.png").symlink_to(pictures[0])
    result = run("reconstruct", pictures[0], "--model", model, "--out", tmp_path)
    assert result.exit_code == BAD_INPUT
    assert "a.rebuilt.png" in result.stderr
    assert pictures[0].read_bytes() == before


def test_a_real_process_keeps_stdout_clean_and_starts_without_torch(tmp_path):
    code = (
        "import sys; from sda_fast.cli import main\n"
        "heavy = {'torch', 'triton', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "encode", str(tmp_path / "none.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == BAD_INPUT, done.stderr
    assert done.stdout == ""
    assert "none.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
