"""What a person looks at during a run: the loss curve and sheets of samples."""

import json
from pathlib import Path
from typing import TextIO

from PIL import Image

from train.stage import Stage


def open_log(folder: Path) -> TextIO:
    """Open folder/log.jsonl to append; a line that a killed run left torn is ended first."""
    path = folder / "log.jsonl"
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    log = path.open("a")
    if torn and path.stat().st_size:
        log.write("\n")
    return log


def read_log(folder: Path) -> dict[int, dict[str, float]]:
    """Return the rows of folder/log.jsonl by step; the later of two, and no torn one."""
    rows = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["step"]] = row
    return rows


def plot_losses(folder: Path) -> None:
    """Draw folder/log.jsonl as folder/loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_log(folder)
    if not rows:
        return
    steps = sorted(rows)
    parts = [key for key in rows[steps[-1]] if key not in ("step", "grad_norm", "lr", "seconds")]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key in parts:
        axes.plot(steps, [rows[s].get(key, float("nan")) for s in steps], label=key, lw=1)
    axes.set(xlabel="step", yscale="log", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)


def save_sheet(folder: Path, step: int, stage: Stage) -> None:
    """Write the stage's sample sheet, if it draws one, as folder/sheets/NNNNNN.png."""
    sheet = stage.sheet()
    if sheet is None:
        return
    target = folder / "sheets" / f"{step:06d}.png"
    target.parent.mkdir(exist_ok=True)
    pixels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((3 * pixels.shape[1], 3 * pixels.shape[0]), 0).save(target)
