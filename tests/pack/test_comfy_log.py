"""Warnings in the log appear once while a prompt runs."""

from comfy_execution.utils import CurrentNodeContext

from chorus.host.log import warn_once


def test_warning_is_logged_once_per_prompt_and_always_without_one(caplog):
    for prompt in ("a", "a", "b"):
        with CurrentNodeContext(prompt, "1"):
            warn_once("first")
            warn_once("first")
            warn_once("second")
    assert [r.getMessage() for r in caplog.records] == ["first", "second"] * 2
    caplog.clear()
    for _ in range(2):
        warn_once("first")
    assert len(caplog.records) == 2
