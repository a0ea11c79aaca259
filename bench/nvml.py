"""What the card says of itself: clocks, power, temperature, and what holds it back."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

THROTTLE = {
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal": 0x20,
    "hw_thermal": 0x40,
    "hw_power_brake": 0x80,
}
"""Bits of NVML's clocks event reasons that mean: slower than it could be."""


def card(device: torch.device) -> dict[str, Any] | None:
    """One reading of the card behind a device.

    Returns:
        gpu, driver, sm_clock_mhz, memory_clock_mhz, power_w, temperature_c and throttle (names of
        THROTTLE); a field that this card does not tell is None. None as a whole where there is no
        such card, or nvidia-ml-py is not installed.
    """
    if device.type != "cuda":
        return None
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, or no driver library to load
        return None
    try:
        handle = _handle(nvml, device)
        return None if handle is None else _read(nvml, handle)
    finally:
        nvml.nvmlShutdown()


def _handle(nvml: Any, device: torch.device) -> Any:
    """By UUID: NVML numbers cards otherwise than CUDA where some are hidden."""
    found = torch.cuda.get_device_properties(device)
    return _ask(nvml, lambda: nvml.nvmlDeviceGetHandleByUUID(f"GPU-{found.uuid}"))


def _read(nvml: Any, handle: Any) -> dict[str, Any]:
    mhz = lambda clock: _ask(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, clock))
    power = _ask(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    reasons = _ask(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    return {
        "gpu": _ask(nvml, lambda: _text(nvml.nvmlDeviceGetName(handle))),
        "driver": _ask(nvml, lambda: _text(nvml.nvmlSystemGetDriverVersion())),
        "sm_clock_mhz": mhz(nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": mhz(nvml.NVML_CLOCK_MEM),
        "power_w": None if power is None else power / 1000,
        "temperature_c": _ask(
            nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        ),
        "throttle": None
        if reasons is None
        else [n for n, bit in THROTTLE.items() if reasons & bit],
    }


def _throttle(reasons: int | None) -> list[str] | None:
    return None if reasons is None else [name for name, bit in THROTTLE.items() if reasons & bit]


def _ask(nvml: Any, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
