"""One progress bar with previews for a node that samples many times."""

import comfy.model_management
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from .previews import as_preview


class SamplingProgress:
    """Progress bar of a node, in sampler steps.

    Every call raises InterruptProcessingException if the user has interrupted the run.
    """

    def __init__(self, model: ModelPatcher, total: int) -> None:
        self.bar, self.done = comfy.utils.ProgressBar(total), 0
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def callback(self, step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        """Count one step and show the estimate of x0 if previews are enabled; used as callback of ComfyUI's samplers."""
        preview = self._previewer.decode_latent_to_preview_image("JPEG", x0) if self._previewer else None
        self._advance(1, preview)

    def show(self, image: Tensor | None = None, steps: int = 0, text: str = "") -> None:
        """Count ``steps`` more steps; show ``image`` [H, W, 3] in 0..1 and ``text`` on the node."""
        if text:
            self._show_text(text)
        self._advance(steps, None if image is None else as_preview(image))

    @staticmethod
    def _show_text(text: str) -> None:
        if (context := get_executing_context()) is not None:
            from server import PromptServer  # imported late, since recipes and tests run without a server

            server = PromptServer.instance  # ty: ignore[missing-attribute]  # its constructor sets it
            server.send_progress_text(text, context.node_id)

    def _advance(self, steps: int, image: tuple[str, Image.Image, int] | None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += steps
        self.bar.update_absolute(self.done, preview=image)
