"""ComfyUI for the host tests: as a library in this process, and as one real server."""

from chorus.host import headless
from chorus.tests.real_comfyui import comfy, server  # noqa: F401 (fixtures)

headless.start()
