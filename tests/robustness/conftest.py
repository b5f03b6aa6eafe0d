"""ComfyUI for the robustness tests: as a library in this process, and as one real server."""

from chorus.dev import headless
from chorus.tests.support.real_comfyui import comfy, server  # noqa: F401 (fixtures)

headless.start()
