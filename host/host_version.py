"""Check of the ComfyUI version when the pack is loaded: missing features are reported in one line, before any run."""

import logging
import re
from pkgutil import resolve_name

log = logging.getLogger("comfyui-chorus")

# The ComfyUI versions that the pack is tested with: the oldest, which run.py installs and pyproject.toml requires, and
# the newest. README.md and dev/tools/setup.py state the same, see tests/common/test_host_version.py.
TESTED, NEWEST_TESTED = "0.30.0", "0.33.0"
FRONTENDS = ("1.47.12", "1.58.1")  # the versions of the web page that the tests of the page passed with

# The most recent ComfyUI features that the pack uses. Without this check, most of them would be missed only in the
# middle of a run. ComfyUI 0.27.0 is the first version with all of them.
NEWEST = (
    "comfy_api.latest.io",
    "comfy.model_management.set_torch_device",
    "comfy.model_management.unload_model_and_clones",
    "comfy.model_patcher.ModelPatcher.deepclone_multigpu",
    "folder_paths.is_within_directory",
)


def is_newer_than_tested() -> bool:
    """Whether ComfyUI is newer than ``TESTED``, which docs/compatibility.md describes."""
    return numbers(version()) > numbers(TESTED)


def check() -> None:
    """Raise ImportError if ComfyUI lacks one of ``NEWEST``; warn if it has all of them but is older than ``TESTED``.

    The error is one line with the version found, the version needed and the missing names; ComfyUI logs it unchanged.
    """
    found = version()
    if missing := [name for name in NEWEST if not has(name)]:
        raise ImportError(
            f"ComfyUI-Chorus needs ComfyUI {TESTED} or newer; this is {found or 'an unknown version'}, "
            f"without {', '.join(missing)}. Update ComfyUI"
        )
    if numbers(found) < numbers(TESTED):
        log.warning(
            f"ComfyUI-Chorus is tested with ComfyUI {TESTED}; this is {found or 'an unknown version'}. "
            "The features that the pack needs exist, but this version is untested: update ComfyUI if something fails"
        )


def version() -> str:
    """Version of this ComfyUI, '' if unknown."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return ""
    return __version__


def numbers(version: str) -> tuple[int, ...]:
    """Version as numbers to compare: (0, 30, 0) for 0.30.0 and 0.30.0rc1."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])


def has(name: str) -> bool:
    """Whether the module, or the attribute of a module, with the dotted ``name`` exists."""
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
