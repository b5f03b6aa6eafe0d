"""ComfyUI-Chorus: several checkpoints sing in one image."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # imported here, not above: pytest imports this file, and the unit tests run without ComfyUI
    from .host import host_version

    host_version.check()  # first: an older ComfyUI may lack what the nodes import

    from .nodes import ChorusExtension

    return ChorusExtension()
