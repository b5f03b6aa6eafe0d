"""What every training node asks of the host: where to train, progress, and that what was learned is kept."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .previews import as_preview

InterruptProcessingException = comfy.model_management.InterruptProcessingException
log = logging.getLogger("comfyui-chorus")


def training_place(model: ModelPatcher) -> tuple[torch.device, torch.dtype]:
    """Where to train, and in which dtype: bfloat16 where the device has it, else float32; never float16, whose gradients
    vanish."""
    device = model.load_device
    wide = comfy.model_management.is_device_cpu(device) or not comfy.model_management.should_use_bf16(device)
    return device, torch.float32 if wide else torch.bfloat16


class TrainingProgress:
    """The node's progress bar; every call asks the host whether the user wants to stop."""

    def __init__(self, total: int):
        self.bar, self.done = comfy.utils.ProgressBar(total), 0

    def __call__(self, picture: Tensor | None = None) -> None:
        """One more is done; ``picture`` [H, W, 3] in 0..1 shows on the node."""
        self.done += 1
        self.bar.update_absolute(self.done, preview=None if picture is None else as_preview(picture))
        comfy.model_management.throw_exception_if_processing_interrupted()


class TrainingRun:
    """The steps of a training as its node shows and keeps them."""

    def __init__(
        self,
        node: str,
        steps: int,
        save: Callable[[str], object],
        show: Callable[[], Tensor | None],
        checkpoint_every: int = 0,
        preview_every: int = 0,
        beforehand: int = 0,
    ):
        """``save(mark)`` puts what was learned so far on disk, in a file with ``mark`` in its name: "", or "interrupted_" or
        "failed_" where that ended the run. It says where, or gives None where there is nothing to keep.

        ``show()``: a picture [H, W, 3] of it. ``beforehand``: calls of ``progress`` before the first step.
        """
        self.node, self.steps, self.save, self.show = node, steps, save, show
        self.checkpoint_every, self.preview_every = checkpoint_every, preview_every
        self.progress = TrainingProgress(beforehand + steps)
        self.remarks: list[str] = []  # for the report

    def after_step(self, done: int, loss: float) -> None:
        self.progress(self.show() if _due(self.preview_every, done) else None)
        # what the last step gives is the node's output
        if _due(self.checkpoint_every, done) and done < self.steps:
            self._checkpoint(done, loss)

    def _checkpoint(self, done: int, loss: float) -> None:
        try:
            log.info("%s: step %d, loss %.5f: %s", self.node, done, loss, self.save(""))
        except OSError as error:
            # hours of training are worth more than this file; the last weights may still find a place
            self.remarks.append(
                f"NOT written: the checkpoint after {done} steps: {error}; make room, or use another checkpoint_prefix"
            )
            log.exception("%s: a checkpoint could not be written; the training goes on", self.node)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """What ends the work inside is raised on, after its result has been put on disk."""
        try:
            yield
        except BaseException as error:
            path = self._saved("interrupted_" if isinstance(error, InterruptProcessingException) else "failed_")
            if path is not None:
                log.warning("%s: what was learned until here is in %s", self.node, path)
                if isinstance(error, ValueError):
                    error.args = (f"{error}; what was learned before is in {path}",)
            raise

    def _saved(self, mark: str) -> object:
        try:
            return self.save(mark)
        except Exception:
            # the error that is on its way says more
            log.exception("%s: what was learned could not be saved", self.node)
            return None


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0
