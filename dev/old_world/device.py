"""Where the recipes train. All random numbers are drawn on the CPU, so that the data are the same everywhere."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast():
    """bfloat16 where it is safe; float32 weights."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def to_device(*tensors):
    return [t.to(DEVICE, non_blocking=True) for t in tensors]
