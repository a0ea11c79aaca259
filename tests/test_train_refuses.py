"""What a run refuses, before anything heavy is loaded or anything is written."""

import pytest
from typer.testing import CliRunner

from tests.pictures import write_pictures
from train.__main__ import app
from train.config import override
from train.frozen import find_parts
from train.recipes import RECIPES


def said(folder, recipe, *more, settings=()):
    """(exit code, what was said) of a command; nothing may have been written."""
    data = write_pictures(folder / "data")
    out = folder / "out"
    words = [f"data={data}", f"out_dir={out}", "rehearsal=small", *settings]
    command = [*recipe, *(part for word in words for part in ("--set", word)), *more]
    result = CliRunner().invoke(app, command)
    assert not out.exists()
    return result.exit_code, result.output


def test_a_dashboard_that_is_not_there(tmp_path):
    code, text = said(tmp_path, ["rehearse"], "--report-to", "dashboard")
    assert code == 1
    assert "report_to must be among wandb, trackio, got 'dashboard'" in text


def test_features_of_layers_that_learn_are_not_precomputed(tmp_path):
    command = ["precompute", "phase4-768"]
    code, text = said(tmp_path, command, "--to", str(tmp_path / "shards"))
    assert code == 1
    assert "open_layers must be 0 for what is precomputed, got 4" in text
    assert not (tmp_path / "shards").exists()


def test_all_frozen_models_that_are_missing_are_named(tmp_path):
    words = [f"{name}={tmp_path / name}" for name in ("flux", "clip", "dino")]
    with pytest.raises(FileNotFoundError, match=r"flux must be .*; clip must be .*; dino must be"):
        find_parts(override(RECIPES["phase0-16"](), words))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("ema_decay=1", "ema_decay must be 0 or more, below 1, got 1.0"),
        ("adamw_lr=-1", "adamw_lr must be at least 0 and finite, got -1.0"),
        ("weight_decay=nan", "weight_decay must be at least 0 and finite, got nan"),
        ("max_grad_norm=0", "max_grad_norm must be positive, got 0.0"),
        ("warmup_steps=-1", "warmup_steps must be at least 0 and finite, got -1"),
        ("penalty=inf", "penalty must be at least 0 and finite, got inf"),
        ("encoder_lr=-1e-5", "encoder_lr must be at least 0 and finite, got -1e-05"),
        ("guidance=nan", "guidance must be at least 0 and finite, got nan"),
        ("num_heads=3", "width must be a multiple of 16 times num_heads, .*got 1024, 3 and 12"),
    ],
)
def test_a_number_that_cannot_be(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(RECIPES["phase4-768"](), [assignment])
