"""Without a GPU the kernels are built for Triton's interpreter, which must be on as they load."""

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

import csrc_triton

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests import interpreter

    interpreter.install()
    for room in csrc_triton.__path__:
        for file in sorted(Path(room).glob("*.py")):
            import_module(f"csrc_triton.{file.stem}")

    # from here on the switch is off, so that models run at full speed, but for the fixture below
    del os.environ["TRITON_INTERPRET"]

# pytest -n starts a process a core; more threads than that only wait for each other
torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one; for what runs on both."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators run the kernels: on the GPU, or on the CPU through Triton's interpreter."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiles of ``joint_tiles`` by name, "middle" unless given; a GPU keeps those of the table."""
    from csrc_triton.tiles import forced
    from tests.joint_tiles import TILES

    name = "table" if torch.cuda.is_available() else getattr(request, "param", "middle")
    with forced(**TILES[name]):
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what must be written with NaN, so an unwritten element cannot pass."""
    with torch.device("meta"):
        torch.empty(0)  # torch remembers at its first use which functions obey a device
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t: torch.Tensor) -> torch.Tensor:
        if t.is_floating_point() and not t.is_meta:
            t.detach().fill_(float("nan"))
        return t

    monkeypatch.setattr(torch, "empty", lambda *a, **kw: poison(empty(*a, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: poison(empty_like(*a, **kw)))
