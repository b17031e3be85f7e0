"""Names of devices, by which stored graphs, ranks and measured times know their machine."""

from __future__ import annotations

import platform

import torch


def card_of(device: torch.device) -> str:
    """Name of the device: a GPU with its compute capability, or the CPU's architecture."""
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
