"""Planting a fault: kernels with one wrong word, in the place of the right ones."""

import importlib.util
import sys
from pathlib import Path

import csrc_triton

SOURCES = Path(csrc_triton.__file__).parent


def plant(monkeypatch, folder, files, launchers, file: str, right: str, wrong: str) -> None:
    """Load files of csrc_triton anew, one of them spoilt, and let the launchers come from there.

    `files` are in the order in which they import each other, `launchers` are names by module.
    """
    for name in files:
        monkeypatch.setitem(sys.modules, f"csrc_triton.{name}", None)
    for name in files:
        text = (SOURCES / f"{name}.py").read_text()
        if name == file:
            assert right in text, f"{file} does not hold {right!r}"
            text = text.replace(right, wrong)
        spoilt = _load(name, text, folder)
        for module, names in launchers.items():
            if module.__name__ == f"csrc_triton.{name}":
                for launcher in names:
                    monkeypatch.setattr(module, launcher, getattr(spoilt, launcher))


def _load(name: str, text: str, folder: Path):
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"csrc_triton.{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
