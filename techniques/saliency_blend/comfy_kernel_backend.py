"""Choice between the Triton and the torch implementation of the kernel."""

import os

from comfy.cli_args import args

VARIABLE = "CHORUS_KERNELS"


def kernel_backend() -> str:
    """The backend of ``saliency_blend``: auto, triton or torch.

    ComfyUI enables Triton only with --enable-triton-backend, because ComfyUI's quantised kernels hang on some GPUs. The
    pack's kernel is a different one and falls back to torch if it fails, so the default is auto. With
    --disable-triton-backend, the default is torch. The environment variable CHORUS_KERNELS overrides both options.

    Errors (ValueError): an unknown value of CHORUS_KERNELS.
    """
    forced = os.environ.get(VARIABLE, "").lower()
    if forced not in ("", "auto", "triton", "torch"):
        raise ValueError(f"the environment variable {VARIABLE} is '{forced}'; set it to auto, triton or torch")
    if forced:
        return forced
    return "torch" if args.disable_triton_backend else "auto"
