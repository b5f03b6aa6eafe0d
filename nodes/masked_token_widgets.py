"""Inputs that the nodes for masked tokens share."""

from comfy_api.latest import io

from .sockets import MaskedTokenModelSocket


def model() -> io.Input:
    return MaskedTokenModelSocket.Input("model", tooltip="From Load Masked Token Model.")


def negative() -> io.Conditioning.Input:
    return io.Conditioning.Input(
        "negative",
        optional=True,
        tooltip="The negative prompt; the authors use an empty one. Required unless cfg is 1.",
    )


def steps(tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=12, min=1, max=1000, tooltip=tooltip)


def cfg() -> io.Float.Input:
    return io.Float.Input(
        "cfg",
        default=0.0,
        min=0.0,
        max=30.0,
        step=0.1,
        tooltip="Guidance scale. 0: the model's default (4 for amused-256, 10 for amused-512). 1: no"
        " guidance, at half the cost.",
    )


def side(name: str, tooltip: str) -> io.Int.Input:
    """``width`` or ``height`` of an image, in pixels."""
    return io.Int.Input(name, default=256, min=16, max=4096, step=16, tooltip=tooltip)


def feather(tooltip: str) -> io.Int.Input:
    return io.Int.Input("feather", default=8, min=0, max=256, advanced=True, tooltip=tooltip)
