"""Device and precision of the recipes.

All random numbers come from CPU generators, so that the training data are the same on every device.
"""

import torch


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_of_device():
    """The name of the GPU, or 'CPU' and the number of threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def has_bfloat16():
    """Whether the processor multiplies bfloat16 natively. Emulated bfloat16 takes about 12 times as long as float32."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    # private functions of torch; if a release of torch lacks them, float32 is used, which is correct but slower
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in probes)


def autocast():
    return torch.autocast(device().type, torch.bfloat16, enabled=has_bfloat16())
