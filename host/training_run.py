"""The run of a training node: device, progress, previews, checkpoints, and what was learned when it ends early."""

import gc
import logging
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
EXAMPLE = "training/mine"  # of a prefix
log = logging.getLogger("comfyui-chorus")


def training_place(model: ModelPatcher) -> tuple[torch.device, torch.dtype]:
    """Where to train, and in which dtype: bfloat16 where the device has it, else float32; never float16, whose gradients
    vanish."""
    device = model.load_device
    wide = comfy.model_management.is_device_cpu(device) or not comfy.model_management.should_use_bf16(device)
    return device, torch.float32 if wide else torch.bfloat16


class TrainingProgress:
    """The node's progress bar; every call asks the host whether the user wants to stop."""

    def __init__(self, total: int) -> None:
        self.bar, self.done = comfy.utils.ProgressBar(total), 0

    def __call__(self, picture: Tensor | None = None) -> None:
        """One more is done; ``picture`` [H, W, 3] in 0..1 shows on the node."""
        self.done += 1
        self.bar.update_absolute(self.done, preview=None if picture is None else as_preview(picture))
        comfy.model_management.throw_exception_if_processing_interrupted()


@dataclass(kw_only=True, eq=False)
class TrainingRun(Generic[E]):
    """A training as its node shows and keeps it."""

    node: str  # its id
    loop: TrainingLoop[E]
    prefix: str  # of files below the output folder
    checkpoint_every: int
    preview_every: int
    learned: Callable[[E | None], Any]  # so far, as the node outputs it; of an evaluation where there is one
    write: Callable[[Any, str], Path]  # what was learned, with a prefix
    report: Callable[[E, E], str]  # before and after
    show: Callable[[], Tensor | None]  # a picture [H, W, 3] of what was learned; None where there is none
    prepare: Callable[[Callable[[], None]], None] | None = None  # before anything else, with a call for progress
    preparations: int = 0  # how often ``prepare`` makes that call
    show_result: bool = True

    remarks: list[str] = field(default_factory=list, init=False)  # for the report
    picture: Tensor | None = field(default=None, init=False)  # of the result
    progress: TrainingProgress = field(init=False)

    def __post_init__(self) -> None:
        check_prefix(self.prefix, EXAMPLE)  # not after hours
        self.progress = TrainingProgress(self.preparations + self.loop.settings.steps)

    def train(self) -> tuple[Any, dict[str, list[float]], str]:
        """What did best, the losses, the report."""
        with self._saved_on_error():
            if self.prepare is not None:
                self.prepare(self.progress)
            before = self.loop.evaluate()
            train(self.loop, self._after_step)
            after = self.loop.restore_best()
            if self.show_result:
                self.picture = self._result_picture()
        lines = [self.report(before, after), *self.remarks]
        return self.learned(after), self.loop.losses, "\n".join(lines)

    def _after_step(self, done: int, loss: float) -> None:
        picture = None
        if _due(self.preview_every, done):
            self._evaluate()
            picture = self.show()
        self.progress(picture)
        # what the last step gives is the node's output
        if _due(self.checkpoint_every, done) and done < self.loop.settings.steps:
            self._checkpoint(done, loss)

    def _evaluate(self) -> E | None:
        """The evaluation of the weights where the best are handed out."""
        return self.loop.evaluate() if self.loop.keep_best else None

    def _checkpoint(self, done: int, loss: float) -> None:
        try:
            path = self._save("", self._evaluate())
            log.info("%s: step %d, loss %.5f: %s", self.node, done, loss, path)
        except OSError as error:
            # hours of training are worth more than this file; the last weights may still find a place
            self.remarks.append(
                f"NOT written: the checkpoint after {done} steps: {error}; make room, or use another checkpoint_prefix"
            )
            log.exception("%s: a checkpoint could not be written; the training goes on", self.node)

    def _save(self, mark: str, evaluation: E | None) -> Path:
        return self.write(self.learned(evaluation), f"{self.prefix}_{mark}step{self.loop.steps}")

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """What ends the work inside is raised on, after what was learned has been written."""
        try:
            yield
        except BaseException as error:
            path = self._save_result("interrupted_" if isinstance(error, InterruptProcessingException) else "failed_")
            if path is not None:
                log.warning("%s: what was learned until here is in %s", self.node, path)
                if isinstance(error, ValueError):
                    error.args = (f"{error}; what was learned before is in {path}",)
            raise

    def _save_result(self, mark: str) -> Path | None:
        """Write the best of a run that ended early; None where not a step was done, or where it cannot be written."""
        if not self.loop.done:
            return None
        try:
            return self._save(mark, self._restore_best())
        except Exception:
            # the error that is on its way says more
            log.exception("%s: what was learned could not be saved", self.node)
            return None

    def _restore_best(self) -> E | None:
        """None where there is nothing to compare the last weights with."""
        if self.loop.best is None:
            return None
        try:
            return self.loop.restore_best()
        except Exception:
            # such as want of memory, which may be what ended the run
            log.exception("%s: the last weights could not be evaluated; they are kept", self.node)
            return None

    def _result_picture(self) -> Tensor | None:
        try:
            return self.show()
        except Exception as error:
            # such as want of memory; a training is worth more than its picture
            log.exception("%s: what was learned could not be shown; it is kept", self.node)
            self.remarks.append(f"NOT shown: the pictures of the result: {error}")
            return None


def release_memory() -> None:
    """Give the memory of a training back, once nothing names it any more."""
    gc.collect()  # a training and its loop name each other
    comfy.model_management.soft_empty_cache()


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0
