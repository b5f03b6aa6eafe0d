"""Widgets of nodes whose work several machines can share."""

from comfy_api.latest import io

MAX_SHARES = 1024


def share(tooltip: str) -> io.Int.Input:
    return io.Int.Input("share", optional=True, default=0, min=0, max=MAX_SHARES - 1, advanced=True, tooltip=tooltip)


def shares(tooltip: str) -> io.Int.Input:
    return io.Int.Input("shares", optional=True, default=1, min=1, max=MAX_SHARES, advanced=True, tooltip=tooltip)
