"""Widgets shared by the nodes that save files."""

from comfy_api.latest import io


def filename_prefix(default: str, further: str = "") -> io.String.Input:
    """The widget ``filename_prefix``. ``further``: another sentence for its tooltip, after a space."""
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip="Folder and name below the output folder, with variables such as %year% as in Save Image. A number is"
        f" added; no file is overwritten.{further}",
    )
