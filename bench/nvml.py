"""Clocks, power, temperature, energy and driver version of a GPU, from NVIDIA's management library (NVML).

The library is part of the driver, so it is called directly and needs no package. Values are None without the library
and where it has no value for a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

GRAPHICS, MEMORY = 0, 2  # kinds of clock
TEMPERATURE_OF_GPU = 0
SLOWED_BY = {  # bits of nvmlDeviceGetCurrentClocksThrottleReasons; an idle GPU and clocks that a user set are left out
    0x4: "the power limit", 0x8: "a hardware limit", 0x10: "other cards in step", 0x20: "its temperature",
    0x40: "its temperature, in hardware", 0x80: "the power supply", 0x100: "the display's clock",
}  # fmt: skip
LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")


@dataclass(frozen=True)
class Card:
    """One GPU of the library; every value is None that the GPU does not support."""

    library: Any
    handle: Any

    def number(self, function: str, *before: int, kind: Any = ctypes.c_uint) -> int | None:
        """Number that `nvmlDevice...(handle, *before, &number)` writes; None if the call fails."""
        value = kind()
        call = getattr(self.library, function, None)
        if call is None or call(self.handle, *before, ctypes.byref(value)) != 0:
            return None
        return int(value.value)

    def energy(self) -> float | None:
        """Joules since the driver was loaded; subtract two readings for the energy of a piece of work."""
        millijoules = self.number("nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong)
        return None if millijoules is None else millijoules / 1e3

    def state(self) -> dict[str, float | int | None]:
        """Clocks in MHz, power in watts, temperature in degrees Celsius, and the bits of the throttle reasons."""
        power = self.number("nvmlDeviceGetPowerUsage")
        limit = self.number("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "graphics_mhz": self.number("nvmlDeviceGetClockInfo", GRAPHICS),
            "graphics_mhz_most": self.number("nvmlDeviceGetMaxClockInfo", GRAPHICS),
            "memory_mhz": self.number("nvmlDeviceGetClockInfo", MEMORY),
            "memory_mhz_most": self.number("nvmlDeviceGetMaxClockInfo", MEMORY),
            "watts": None if power is None else power / 1e3,
            "watts_most": None if limit is None else limit / 1e3,
            "celsius": self.number("nvmlDeviceGetTemperature", TEMPERATURE_OF_GPU),
            "slowed_by": self.number("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong),
        }

    def driver(self) -> str | None:
        text = ctypes.create_string_buffer(96)
        failed = self.library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
        return None if failed else text.value.decode()


def slowed_by(bits: int | None) -> list[str]:
    """Throttle reasons of a GPU as phrases."""
    return [reason for bit, reason in SLOWED_BY.items() if (bits or 0) & bit]


def find_card(uuid: str) -> Card | None:
    """Find the GPU with a UUID, as torch gives it; None without the library or such a GPU."""
    library = load_library()
    if library is None or library.nvmlInit_v2() != 0:
        return None
    handle = ctypes.c_void_p()
    name = (uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}").encode()
    return None if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) else Card(library, handle)


def load_library() -> Any:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
