"""What a time depends on besides the code."""

import platform

import torch

from bench.nvml import card
from bench.records import Record, commit, run_id, versions


def circumstances(device: torch.device) -> Record:
    """What a time depends on besides the code: GPU, driver, versions. One call a run.

    Returns:
        gpu and driver (None on a CPU), processor, torch, triton (None where it is not installed),
        versions, commit and run.
    """
    found = versions(("torch", "triton", "flash-attn", "nvidia-ml-py"))
    read = card(device) or {}
    on_gpu = device.type == "cuda"
    if on_gpu and torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": read.get("driver"),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "triton": found.get("triton"),
        "versions": found,
        "commit": commit(),
        "run": run_id(),
    }
