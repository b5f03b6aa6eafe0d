"""One progress bar with previews for a node that samples many times."""

from collections.abc import Callable

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...host.previews import as_preview
from .select import SeedSelect

InterruptProcessingException = comfy.model_management.InterruptProcessingException


class SeedProgress:
    """Counts in steps of samplers, over all that a node does. Every call ends the node if the user interrupts."""

    def __init__(self, model: ModelPatcher, total: int) -> None:
        self.bar, self.done = comfy.utils.ProgressBar(total), 0
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def callback(self, step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        """For ComfySeedSampler.callback: one step is done; shows the estimate of x0 if the user wants previews."""
        show = self._previewer.decode_latent_to_preview_image("JPEG", x0) if self._previewer else None
        self._advance(1, show)

    def show(self, picture: Tensor | None = None, steps: int = 0, text: str = "") -> None:
        """``steps`` more are done; ``picture`` [H, W, 3] in 0..1, the best so far, and ``text`` show on the node."""
        if text:
            self._tell(text)
        self._advance(steps, None if picture is None else as_preview(picture))

    @staticmethod
    def _tell(text: str) -> None:
        if (context := get_executing_context()) is not None:
            from server import PromptServer  # only a node that runs has one; recipes and tests need not load it

            server = PromptServer.instance  # ty: ignore[missing-attribute]  # its constructor sets it
            server.send_progress_text(text, context.node_id)

    def _advance(self, steps: int, image: tuple[str, Image.Image, int] | None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += steps
        self.bar.update_absolute(self.done, preview=image)


class SelectProgress(SeedProgress):
    """What the user sees during a run of ``select``: how far it is, the best score so far and its picture."""

    def __init__(self, select: SeedSelect, model: ModelPatcher, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model, 1)
        self._select, self._decode = select, decode
        self._shown: Tensor | None = None  # the latent of the best picture

    def callback(self, step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        """The estimates of x0 show until there is a best picture."""
        self.bar.total = self._select.planned
        if self._shown is None:
            super().callback(step, x0, x, total_steps)
        else:
            self.show(steps=1)

    def __call__(
        self,
        done: int,
        total: int,
        score: float,
        latent: Callable[[], Tensor],
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """As ``records.Progress``; ``decode``: in place of the usual one."""
        self.bar.total = total
        best, picture = latent(), None
        if best is not self._shown:
            with torch.no_grad():
                self._shown, picture = best, (decode or self._decode)(best)[0]
        self.show(picture, done - self.done, f"best score {score:.4f}, {done} of {total} model evaluations")
