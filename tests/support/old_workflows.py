"""The example workflows as they were saved at commit d6a205e, before inputs were renamed."""

import atexit
import functools
import shutil
import tempfile
import zipfile
from pathlib import Path

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "workflows_d6a205e.zip"


@functools.cache
def saved_workflows() -> tuple[Path, ...]:
    """The paths of the workflow files, unpacked into a temporary folder once per process."""
    folder = Path(tempfile.mkdtemp(prefix="chorus-workflows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return tuple(sorted(folder.glob("*.json")))
