"""ComfyUI-Chorus: several checkpoints sing in one image."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import ChorusExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ChorusExtension:
    # imported here, not above: pytest imports this file, and the unit tests run without ComfyUI
    from .host import host_version

    host_version.check()  # first: an older ComfyUI may lack what the nodes import

    from .nodes import ChorusExtension

    return ChorusExtension()
