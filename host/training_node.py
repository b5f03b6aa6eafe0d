"""The run of a training node: what of the training is shown and kept."""

import logging
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..training.loop import AveragingTrainer
from .files import check_prefix
from .training_run import TrainingRun

EXAMPLE = "training/mine"  # of a prefix


class TrainingNodeRun:
    """A training with what a user sees and keeps of it.

    A subclass has ``_report``, ``_learned``, ``_write`` and ``sheet``.
    """

    node: ClassVar[str]  # its id

    def __init__(
        self, trainer: AveragingTrainer, prefix: str, checkpoint_every: int, preview_every: int, beforehand: int = 0
    ):
        """``beforehand``: how often ``_before`` calls ``run.progress``."""
        check_prefix(prefix, EXAMPLE)  # not after hours
        self.trainer, self.prefix = trainer, prefix
        steps = trainer.settings.steps
        self.run = TrainingRun(
            self.node, steps, self._save, self._show, checkpoint_every, preview_every, beforehand=beforehand
        )
        self.last_sheet: Tensor | None = None  # of what is handed out; known when it is trained

    def train(self) -> tuple[Any, dict, str]:
        """What did best, the losses, the report."""
        trainer, run = self.trainer, self.run
        with run.keeping():
            self._before()
            before = trainer.examine()
            trainer.train(run.after_step)
            after = trainer.settle()
            self.last_sheet = self._last_sheet()
        lines = [self._report(before, after), *run.remarks]
        return self._learned(after), trainer.losses, "\n".join(lines)

    def _before(self) -> None:
        """What the run does before anything is looked at."""

    def _report(self, before, after) -> str:
        raise NotImplementedError

    def _learned(self, examined) -> Any:
        """What is learned so far, as the node gives it; ``examined``: how it does, None where that is not known."""
        raise NotImplementedError

    def _write(self, learned: Any, prefix: str) -> Path:
        """Into a file below the output folder; where it is."""
        raise NotImplementedError

    def sheet(self) -> Tensor | None:
        """Held-out pictures [H, W, 3] with what is made of them; None where they cannot be shown."""
        raise NotImplementedError

    def _save(self, mark: str) -> Path | None:
        """None where not a step was done."""
        trainer = self.trainer
        if not trainer.done:
            return None
        examined = self._settled() if mark else trainer.examine()
        return self._write(self._learned(examined), f"{self.prefix}_{mark}step{trainer.steps}")

    def _settled(self):
        """How the best weights of a run that ended early do; None where there is nothing to compare the last with."""
        if self.trainer.best is None:
            return None
        try:
            return self.trainer.settle()
        except Exception:
            # such as want of memory, which may be what ended the run
            logging.exception("%s: the last weights could not be examined; they are kept", self.node)
            return None

    def _last_sheet(self) -> Tensor | None:
        try:
            return self.sheet()
        except Exception as error:
            # such as want of memory; a training is worth more than its picture
            logging.exception("%s: what was learned could not be shown; it is kept", self.node)
            self.run.remarks.append(f"NOT shown: the pictures of the result: {error}")
            return None

    def _show(self) -> Tensor | None:
        self.trainer.examine()  # so that the best is known
        return self.sheet()
