"""Warnings in ComfyUI's log, each of them once while a prompt runs: a node may sample hundreds of times."""

import logging

from comfy_execution.utils import get_executing_context

log = logging.getLogger("comfyui-chorus")
_logged: set[str] = set()  # in the prompt with the id ``_prompt``
_prompt: str | None = None


def warn_once(text: str) -> None:
    """Log ``text`` as a warning, unless the running prompt has logged it; without a prompt, log it always."""
    global _prompt
    context = get_executing_context()
    if context is None or context.prompt_id != _prompt:
        _logged.clear()
        _prompt = None if context is None else context.prompt_id
    if context is None or text not in _logged:
        log.warning("%s", text)
    _logged.add(text)
