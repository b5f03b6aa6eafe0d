"""Run of a training node: device, progress, previews, checkpoints, and the saved result of a run that ends early."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..training.loop import E, TrainingLoop, train
from .files import check_prefix
from .previews import as_preview

InterruptProcessingException = comfy.model_management.InterruptProcessingException
EXAMPLE = "training/mine"  # example of a checkpoint_prefix
log = logging.getLogger("comfyui-chorus")


def training_device_and_dtype(model: ModelPatcher) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a training: bfloat16 if the device supports it, else float32; never float16, whose gradients
    underflow."""
    device = model.load_device
    wide = comfy.model_management.is_device_cpu(device) or not comfy.model_management.should_use_bf16(device)
    return device, torch.float32 if wide else torch.bfloat16


class TrainingProgress:
    """Progress bar of the node; every call raises if the user has cancelled the run."""

    def __init__(self, total: int) -> None:
        self.bar, self.done = comfy.utils.ProgressBar(total), 0

    def __call__(self, image: Tensor | None = None) -> None:
        """Count one more step and show ``image`` [H, W, 3] in 0..1 on the node."""
        self.done += 1
        self.bar.update_absolute(self.done, preview=None if image is None else as_preview(image))
        comfy.model_management.throw_exception_if_processing_interrupted()


@dataclass(kw_only=True, eq=False)
class TrainingRun(Generic[E]):
    """A training, with the callbacks by which its node shows and saves results."""

    node: str  # node id
    loop: TrainingLoop[E]
    prefix: str  # of files below the output folder
    checkpoint_every: int  # steps; 0 is off
    preview_every: int  # steps; 0 is off
    output: Callable[[E | None], Any]  # returns the node's output for the current weights and, if any, their evaluation
    write: Callable[[Any, str], Path]  # saves an output under a prefix
    report: Callable[[E, E], str]  # returns a text about the evaluations before and after the training
    show: Callable[[], Tensor | None]  # returns a preview image [H, W, 3] of the current weights, if any
    prepare: Callable[[Callable[[], None]], None] | None = None  # runs first; receives a callback for progress
    preparations: int = 0  # number of calls of that callback
    show_result: bool = True

    remarks: list[str] = field(default_factory=list, init=False)  # for the report
    image: Tensor | None = field(default=None, init=False)  # preview of the result
    progress: TrainingProgress = field(init=False)

    def __post_init__(self) -> None:
        check_prefix(self.prefix, EXAMPLE)  # fail now, not after hours of training
        self.progress = TrainingProgress(self.preparations + self.loop.settings.steps)

    def train(self) -> tuple[Any, dict[str, list[float]], str]:
        """Train; returns the output of the best checkpoint, the losses by name, and the report."""
        with self._saved_on_error():
            if self.prepare is not None:
                self.prepare(self.progress)
            before = self.loop.evaluate()
            train(self.loop, self._after_step)
            after = self.loop.restore_best()
            if self.show_result:
                self.image = self._result_image()
        lines = [self.report(before, after), *self.remarks]
        return self.output(after), self.loop.losses, "\n".join(lines)

    def _after_step(self, done: int, loss: float) -> None:
        image = None
        if _due(self.preview_every, done):
            self._evaluate()
            image = self.show()
        self.progress(image)
        # no checkpoint after the last step, whose result is the node's output
        if _due(self.checkpoint_every, done) and done < self.loop.settings.steps:
            self._checkpoint(done, loss)

    def _evaluate(self) -> E | None:
        """Evaluation of the current weights if the run returns the best checkpoint, else None."""
        return self.loop.evaluate() if self.loop.keep_best else None

    def _checkpoint(self, done: int, loss: float) -> None:
        try:
            path = self._save("", self._evaluate())
            log.info("%s: checkpoint of step %d, loss %.5f: %s", self.node, done, loss, path)
        except OSError as error:
            # continue: the training is worth more than this file, and the final weights may still be saved
            # without the path in the error, since reports are saved and shared; the log has it
            why = f"[Errno {error.errno}] {os.strerror(error.errno)}" if error.errno else type(error).__name__
            self.remarks.append(
                f"NOT written: the checkpoint after {done} steps: {why}; free disk space or use another checkpoint_prefix"
            )
            log.exception("%s: a checkpoint could not be written; training continues", self.node)

    def _save(self, mark: str, evaluation: E | None) -> Path:
        return self.write(self.output(evaluation), f"{self.prefix}_{mark}step{self.loop.steps}")

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Save the weights trained so far if an exception ends the block, then raise it again."""
        try:
            yield
        except BaseException as error:
            path = self._save_result("interrupted_" if isinstance(error, InterruptProcessingException) else "failed_")
            if path is not None:
                log.warning("%s: the weights trained so far are in %s", self.node, path)
                if isinstance(error, ValueError):
                    error.args = (f"{error}; the weights trained so far are in {path}",)
            raise

    def _save_result(self, mark: str) -> Path | None:
        """Write the best checkpoint of a run that ended early; None if no step was done or writing failed."""
        if not self.loop.done:
            return None
        try:
            return self._save(mark, self._restore_best())
        except Exception:
            # the exception that ended the run is more important
            log.exception("%s: the trained weights could not be saved", self.node)
            return None

    def _restore_best(self) -> E | None:
        """Restore the best checkpoint; None if there is none, or if the last weights could not be evaluated."""
        if self.loop.best is None:
            return None
        try:
            return self.loop.restore_best()
        except Exception:
            # for example out of memory, which may also be the error that ended the run
            log.exception("%s: the last weights could not be evaluated; they are saved without evaluation", self.node)
            return None

    def _result_image(self) -> Tensor | None:
        try:
            return self.show()
        except Exception as error:
            # for example out of memory; the trained weights are worth more than their preview
            log.exception("%s: the preview of the result failed; the trained weights are kept", self.node)
            self.remarks.append(f"NOT shown: the preview of the result: {error}")
            return None


def release_memory() -> None:
    """Free the memory of a training to which no reference remains."""
    gc.collect()  # a training and its loop reference each other
    comfy.model_management.soft_empty_cache()


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0
