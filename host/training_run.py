"""What every training node asks of the host while it runs: progress, and that what was learned is kept when it ends early."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
from torch import Tensor

from .previews import as_preview

InterruptProcessingException = comfy.model_management.InterruptProcessingException
log = logging.getLogger("comfyui-chorus")


class TrainingProgress:
    """The node's progress bar; every call asks the host whether the user wants to stop."""

    def __init__(self, total: int):
        self.bar, self.done = comfy.utils.ProgressBar(total), 0

    def __call__(self, picture: Tensor | None = None) -> None:
        """One more is done; ``picture`` [H, W, 3] in 0..1 shows on the node."""
        self.done += 1
        self.bar.update_absolute(self.done, preview=None if picture is None else as_preview(picture))
        comfy.model_management.throw_exception_if_processing_interrupted()


@contextmanager
def keeping(save: Callable[[str], object], node: str) -> Iterator[None]:
    """What ends the work inside is raised on, after ``save("interrupted" or "failed")`` has put its result on disk.

    ``save`` returns where, for the log and for the error, or None where there is nothing to keep.
    """
    try:
        yield
    except BaseException as error:
        path = _saved(save, "interrupted" if isinstance(error, InterruptProcessingException) else "failed", node)
        if path is not None:
            log.warning("%s: what was learned until here is in %s", node, path)
            if isinstance(error, ValueError):
                error.args = (f"{error}; what was learned before is in {path}",)
        raise


def _saved(save: Callable[[str], object], reason: str, node: str) -> object:
    try:
        return save(reason)
    except Exception:
        # the error that is on its way says more
        log.exception("%s: what was learned could not be saved", node)
        return None
