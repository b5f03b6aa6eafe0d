"""The ComfyUI that the pack needs. What lacks it is told in one line when the pack is loaded, not by a traceback in a run."""

import logging
import re
from pkgutil import resolve_name

log = logging.getLogger("comfyui-chorus")

TESTED = "0.30.0"  # the pack's tests run in it; pyproject.toml asks for it in requires-comfyui

# The newest of what the pack asks ComfyUI for, mostly deep inside a run. 0.27.0 is the first to have all of it.
NEWEST = (
    "comfy_api.latest.io",
    "comfy.model_management.set_torch_device",
    "comfy.model_management.unload_model_and_clones",
    "comfy.model_patcher.ModelPatcher.deepclone_multigpu",
    "folder_paths.is_within_directory",
)


def check() -> None:
    """Refuse a ComfyUI that lacks something of ``NEWEST``; warn of one that lacks nothing but is older than ``TESTED``.

    Raises ImportError with one line: what is there, what is wanted, what is missing. ComfyUI logs it as it is.
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
            "What the pack asks for is there, the rest is untried: update ComfyUI if something fails"
        )


def version() -> str:
    """The version of this ComfyUI, '' where it does not tell."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return ""
    return __version__


def numbers(version: str) -> tuple[int, ...]:
    """0.30.0 and 0.30.0rc1 as (0, 30, 0): to compare."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])


def has(name: str) -> bool:
    """Whether there is such a module, or such an attribute of one."""
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
