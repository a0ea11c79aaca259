import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from bench.__main__ import SUITES
from bench.report import SECTIONS
from sda_fast.cli import app
from train.__main__ import app as train
from train.recipes import CHAINS, RECIPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_first_program_runs_as_it_stands(tmp_path, monkeypatch):
    program = blocks("python")[0]
    assert len(program.strip().splitlines()) == 8
    monkeypatch.chdir(tmp_path)
    for name, color in (("a.png", "red"), ("b.png", "navy")):
        Image.new("RGB", (48, 48), color).save(name)
    names = {}
    exec(program, names)
    assert names["picture"].size == (32, 32)
    assert len(names["between"]) == 5
    assert names["stock"].images[0].size == (32, 32)


def test_every_generated_section_has_its_place():
    for name in SECTIONS:
        assert README.count(f"<!-- generated:{name} -->") == 1


def test_every_command_it_names_is_there():
    shell = "\n".join(blocks("bash"))
    commands = {command.name or command.callback.__name__ for command in train.registered_commands}
    named = set(re.findall(r"-m train ([\w-]+)", README)) - {"--list"}
    assert named - {"RECIPE"} <= {*RECIPES, *CHAINS, *commands}
    assert commands - {"run"} <= named
    firsts = {name for name, make in RECIPES.items() if not getattr(make(), "parent", None)}
    assert firsts <= {*named, *CHAINS["scenes-encoders"]}
    assert set(re.findall(r"python -m bench ([\w-]+)", README)) <= SUITES.keys()
    helped = CliRunner().invoke(app, ["--help"]).output
    commands = "reconstruct", "encode", "decode", "edit", "mix", "interpolate", "info", "doctor"
    for command in commands:
        assert f"`{command}`" in README or f"sda-fast {command}" in README
        assert command in helped
    targets = set(re.findall(r"^make (\w+)", shell, re.MULTILINE))
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def test_its_tables_are_those_of_the_results():
    from bench.report import main

    main(readme=ROOT / "README.md", results=ROOT / "bench/results", check=True)
