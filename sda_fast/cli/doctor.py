"""What is installed, what attention will run on, and whether the shipped weights are whole."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = (
    "torch", "triton", "diffusers", "transformers", "safetensors", "numpy", "pillow", "flash-attn",
)  # fmt: skip
OPTIONAL = frozenset({"triton", "flash-attn"})
"""Packages that something else can stand in for."""


def examine(model: str = "scenes") -> dict[str, Any]:
    """Look at this installation; nothing is changed.

    Args:
        model: the pipeline folder, or shipped model by name, to check.

    Returns:
        What can be written as JSON: ``platform``; ``versions`` {package: version or None};
        ``gpus``, a list of {name, capability, memory_gib}; ``attention`` {"cpu" or "cuda":
        {path, why, works}}, path None where nothing runs; ``model`` {name, ok, detail}, ok None
        for a hub id, which is not looked at; and ``problems``, one sentence each, empty if all is
        well.
    """
    versions = {name: _version(name) for name in PACKAGES}
    problems = _version_problems(versions)
    gpus = _gpus()
    attention = {"cpu": _cpu_attention(versions), "cuda": _cuda_attention(gpus)}
    if not attention["cpu"]["works"]:
        problems.append(f"attention on the CPU fails: {attention['cpu']['why']}")
    if gpus and not attention["cuda"]["works"]:
        problems.append(f"attention on the GPU fails: {attention['cuda']['why']}")
    about_model = _examine_model(model)
    if about_model["ok"] is False:
        problems.append(f"model {model}: {about_model['detail']}")
    return {
        "platform": f"Python {platform.python_version()} on {platform.platform()}",
        "versions": {"sda-fast": _version("sda-fast"), **versions},
        "gpus": gpus,
        "attention": attention,
        "model": about_model,
        "problems": problems,
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print what ``examine`` returned, for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("platform", report["platform"])
    for name, version in report["versions"].items():
        table.add_row(name, version or "[dim]not installed[/dim]")
    for gpu in report["gpus"]:
        table.add_row(
            "GPU", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        )
    if not report["gpus"]:
        table.add_row("GPU", "none that torch can use")
    for device, about in report["attention"].items():
        path = about["path"] or "[yellow]none[/yellow]"
        table.add_row(f"attention, {device}", f"{path}: {about['why']}")
    table.add_row(f"model {report['model']['name']}", report["model"]["detail"])
    console.print(table)
    for problem in report["problems"]:
        console.print(f"[red]problem:[/red] {problem}")
    if not report["problems"]:
        console.print("[green]all is well[/green]")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _version_problems(versions: dict[str, str | None]) -> list[str]:
    """Packages that are missing or older than this package asks for."""
    from packaging.requirements import Requirement

    floors = {}
    for text in metadata.requires("sda-fast") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "flash"}):
            floors[requirement.name] = requirement.specifier
    problems = []
    for name, version in versions.items():
        if version is None:
            if name not in OPTIONAL:
                problems.append(f"{name} is not installed")
        elif name in floors and not floors[name].contains(version, prereleases=True):
            problems.append(f"{name} must be {floors[name]}, got {version}")
    return problems


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory_gib": round(gpu.total_memory / 2**30, 1),
            }
        )
    return found


def _cpu_attention(versions: dict[str, str | None]) -> dict[str, Any]:
    """Run the operator once, small, next to its reference."""
    path = "reference through SDPA"
    why = "CPU tensors go to torch's scaled_dot_product_attention with the rule's mask"
    if versions["triton"] and _interpreter_is_on():
        path = "Triton's interpreter"
        why = "TRITON_INTERPRET=1 is set: the kernels run on the CPU, slowly"
    return _try_attention("cpu", path, why)


def _cuda_attention(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the operator once on the GPU, if there is one."""
    path, why = "Triton", "CUDA tensors run the Triton kernels"
    if not gpus:
        return {"path": path, "why": f"{why}; no GPU here to try them on", "works": False}
    return _try_attention("cuda", path, why)


def _try_attention(device: str, path: str, why: str) -> dict[str, Any]:
    import torch

    from sda_fast import ops, reference
    from sda_fast.hierarchy import Hierarchy

    tree = Hierarchy((2, 1))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, tree.num_tokens + 9, 2, 16, generator=generator).to(device)
    try:
        found = ops.hierarchical_attention(q, k, v, tree, 3, 3)
        expected: Any = reference.hierarchical_attention(q.cpu(), k.cpu(), v.cpu(), tree, 3, 3)
        error = float((found.cpu() - expected).abs().max())
    except (RuntimeError, ValueError) as failure:
        return {"path": None, "why": str(failure), "works": False}
    why += f"; tried here, {error:.1e} from the plain formula"
    return {"path": path, "why": why, "works": error < 1e-4}


def _examine_model(model: str) -> dict[str, Any]:
    """Compare the model's files with its manifest; nothing is downloaded for it."""
    from sda_fast.pipeline_folder import MANIFEST, SHIPPED, find_root, read_settings

    about: dict[str, Any] = {"name": model, "ok": False}
    if model != SHIPPED and not Path(model).exists() and _is_hub_id(model):
        return {**about, "ok": None, "detail": "no folder here; a hub id is checked when loaded"}
    try:
        root = find_root(model)
        read_settings(root)
    except (ValueError, OSError) as error:
        return {**about, "detail": str(error)}
    files = [path for path in root.rglob("*") if path.is_file()]
    size = f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {root}"
    if not (root / MANIFEST).is_file():
        return {**about, "ok": True, "detail": f"{size}; it has no {MANIFEST} to compare with"}
    return {**about, "ok": True, "detail": f"whole: as {MANIFEST} says, {size}"}


def _is_hub_id(model: str) -> bool:
    """Whether the model would be looked for on the hub, as ``owner/name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return model.count("/") == 1


def _interpreter_is_on() -> bool:
    """Whether Triton's own switch TRITON_INTERPRET is set, as Triton read it."""
    import triton

    return bool(triton.knobs.runtime.interpret)
