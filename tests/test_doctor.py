"""The doctor: what it finds, and what it calls a problem."""

import json
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

from sda_fast import ops
from sda_fast.cli import app, doctor
from tests.tiny_scenes import tiny_scenes_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_scenes_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def torn(tmp_path):
    folder = tmp_path / "torn"
    tiny_scenes_pipeline().save_pretrained(folder)
    file = folder / "dino" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    return folder


def run(*args):
    return CliRunner().invoke(app, ["doctor", *map(str, args)], env={"COLUMNS": "200"})


def test_a_sound_installation_has_no_problems(model):
    report = doctor.examine(str(model))
    assert report["problems"] == []
    assert report["versions"]["torch"] == torch.__version__
    assert report["model"]["ok"]
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert json.loads(json.dumps(report)) == report


def test_it_says_which_attention_runs_and_why(model, monkeypatch):
    monkeypatch.setattr(doctor, "_interpreter_is_on", lambda: False)
    attention = doctor.examine(str(model))["attention"]
    assert attention["cpu"]["path"] == "reference through SDPA"
    assert attention["cpu"]["works"]
    assert "TRITON_INTERPRET" not in attention["cpu"]["why"]
    assert attention["cuda"]["path"] == "Triton"
    assert attention["cuda"]["works"] == torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without")
def test_it_says_that_the_interpreter_runs_the_kernels(model, kernels):
    about = doctor.examine(str(model))["attention"]["cpu"]
    assert about["path"] == "Triton's interpreter"
    assert "TRITON_INTERPRET" in about["why"]
    assert about["works"]


def test_attention_that_fails_on_a_gpu_is_a_problem(model, monkeypatch):
    gpu = {"name": "old", "capability": "7.5", "memory_gib": 8.0}
    monkeypatch.setattr(doctor, "_gpus", lambda: [gpu])
    refused = {"path": None, "why": "capability 8.0 or newer, got 7.5", "works": False}
    monkeypatch.setattr(doctor, "_cuda_attention", lambda gpus: refused)
    [problem] = doctor.examine(str(model))["problems"]
    assert "attention on the GPU fails: capability 8.0 or newer, got 7.5" in problem


def test_attention_that_computes_something_else_is_a_problem(model, monkeypatch):
    right = ops.hierarchical_attention
    monkeypatch.setattr(ops, "hierarchical_attention", lambda *args: right(*args) * 1.01)
    [problem] = doctor.examine(str(model))["problems"]
    assert "attention on the CPU" in problem


def test_a_flipped_bit_in_the_weights_is_a_problem(torn):
    result = run("--model", torn)
    assert result.exit_code == 1
    assert "dino/model.safetensors" in result.stdout.replace("\n", "")
    [problem] = json.loads(run("--model", torn, "--json").stdout)["problems"]
    assert "model.safetensors" in problem


def test_a_missing_model_is_a_problem(tmp_path):
    result = run("--model", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "nowhere" in result.stdout


def test_a_hub_id_is_no_problem_and_what_cannot_be_one_is():
    report = doctor.examine("someone/some-model")
    assert report["problems"] == []
    assert report["model"]["ok"] is None
    assert "hub id" in report["model"]["detail"]
    for wrong in ("nowhere", "a/b/c", "./nowhere", "/nowhere"):
        [problem] = doctor.examine(wrong)["problems"]
        assert wrong.removeprefix("./") in problem


@pytest.mark.parametrize(
    ("package", "version", "named"),
    [("torch", "2.1.0", ">=2.10"), ("diffusers", None, "not installed"), ("triton", None, None)],
)
def test_an_old_or_missing_package_is_a_problem(model, monkeypatch, package, version, named):
    real = metadata.version

    def pretended(name):
        if name != package:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", pretended)
    report = doctor.examine(str(model))
    assert report["versions"][package] == version
    if named is None:
        assert report["problems"] == []
    else:
        [problem] = report["problems"]
        assert package in problem
        assert named in problem


def test_the_command_prints_for_people(model):
    result = run("--model", model)
    assert result.exit_code == 0
    for words in ("torch", "attention, cpu", "attention, cuda", "all is well"):
        assert words in result.stdout
