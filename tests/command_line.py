"""Running ``sda-fast`` inside the test's own process."""

import torch
from PIL import Image
from typer.testing import CliRunner

from sda_fast.cli import app
from sda_fast.pipeline import SemanticPipeline
from tests.tiny_scenes import tiny_scenes_pipeline

OK, FAILED, BAD_INPUT = 0, 1, 2


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def lines(result):
    """What a command that went well printed to stdout."""
    assert result.exit_code == OK, result.stderr
    return result.stdout.splitlines()


def pixels(picture):
    return picture.size, picture.tobytes()


def write_noise(path, size):
    """A picture of noise, (width, height) pixels."""
    generator = torch.Generator().manual_seed(size[0])
    noise = torch.randint(256, (*size[::-1], 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    return path


def save_model(factory):
    """A folder for ``--model``; factory is pytest's tmp_path_factory."""
    folder = factory.mktemp("model") / "tiny"
    tiny_scenes_pipeline().save_pretrained(folder)
    return folder


def load_model(folder):
    """What lies in it, without bars."""
    pipe = SemanticPipeline.from_pretrained(folder)
    pipe.flux.set_progress_bar_config(disable=True)
    return pipe
