import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sda_fast

ROOT = Path(__file__).parent.parent


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_torch_only():
    loaded = run_python(
        "import sys, torch; from sda_fast import Hierarchy, SemanticEmbedding, ops, reference\n"
        "print([m for m in ('triton', 'diffusers', 'transformers') if m in sys.modules])"
    )
    # torch itself may have imported triton by then; what counts is that we add nothing
    by_torch = run_python("import sys, torch; print(['triton'] if 'triton' in sys.modules else [])")
    assert loaded == by_torch


def test_the_package_works_where_triton_is_missing():
    assert (
        run_python(
            "import sys; sys.modules['triton'] = None\n"
            "import torch, sda_fast as sda\n"
            "tree = sda.Hierarchy((1, 1))\n"
            "q = torch.randn(1, 9, 2, 16)\n"
            "print(tuple(sda.ops.hierarchical_attention(q, q, q, tree, 2, 2).shape))"
        )
        == "(1, 9, 2, 16)"
    )


def test_every_public_name_can_be_had():
    for name in sda_fast.__all__:
        assert getattr(sda_fast, name) is not None
    assert callable(sda_fast.attach)
    with pytest.raises(AttributeError, match="'sda_fast' has no attribute 'atach'"):
        sda_fast.atach  # noqa: B018


def test_no_public_name_is_hidden_by_a_submodule_of_that_name():
    assert not [name for name in sda_fast._HOMES if (ROOT / f"sda_fast/{name}.py").exists()]


def test_the_project_file_promises_what_the_readme_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    needed = [*project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        needed += extra
    assert not [need for need in needed if "<" in need or "==" in need.split(";")[0]]
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert packages == ["csrc_triton*", "sda_fast*"]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_ci_runs_what_the_readme_says_and_nothing_else():
    commands = [
        line
        for line in (ROOT / ".ci/run").read_text().splitlines()
        if line and not line.startswith(("#", "set ", "cd "))
    ]
    assert commands == ["make check", "make test", "make gate"]


def test_a_second_set_up_does_nothing():
    """make -q setup says whether anything is left to do, once .venv is there."""
    if not (ROOT / ".venv/.ready").exists():
        pytest.skip("the tests do not run from a .venv that make set up")
    done = subprocess.run(["make", "-q", "setup"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0
