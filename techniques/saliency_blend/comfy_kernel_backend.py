"""Which implementation of the pack's kernels runs."""

import os

from comfy.cli_args import args

VARIABLE = "CHORUS_KERNELS"


def kernel_backend() -> str:
    """auto, triton or torch.

    ComfyUI leaves Triton off unless asked (--enable-triton-backend), because its own quantised kernels hang on some
    GPUs. Ours are not those, and stay on torch by themselves where they are not known to run: so auto it is, unless
    the user forbids Triton with --disable-triton-backend. $CHORUS_KERNELS decides over both.
    """
    forced = os.environ.get(VARIABLE, "").lower()
    if forced not in ("", "auto", "triton", "torch"):
        raise ValueError(f"{VARIABLE} is '{forced}'; it may be auto, triton or torch")
    if forced:
        return forced
    return "torch" if args.disable_triton_backend else "auto"
