"""ComfyUI-Chorus: blends several checkpoints in one image inside ComfyUI's samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import ChorusExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ChorusExtension:
    # imported here because pytest imports this file, and tests of pure code run without ComfyUI
    from .host import host_version

    host_version.check()  # before the nodes are imported, because their imports can fail in an older ComfyUI

    from .nodes import ChorusExtension

    return ChorusExtension()
