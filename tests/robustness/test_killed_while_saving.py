"""A process killed while saving leaves no partial file that a loader offers.

The test uses SIGKILL, so it does not cover power cuts. Safetensors files are synced to the disk before they are
renamed, but image pairs are not. Data lost by the disk itself cannot be detected.
"""

import os

import pytest

from chorus.tests.robustness.worker import worker_process

KILLS = 7  # per saver, of six savers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_partial_file_after_a_kill(tmp_path, record_property):
    with worker_process(tmp_path, {"kills": KILLS}) as result:
        outcome = result("kills")
    assert not outcome["errors"], "\n".join(outcome["errors"])
    figures = outcome["savers"]
    for name, counts in figures.items():
        record_property(name, counts)
        assert counts["kills"] == KILLS
    # fewer leftover or finished files would mean that the kills did not hit the processes while they were saving
    assert sum(counts["left"] for counts in figures.values()) >= KILLS
    assert sum(counts["loaded"] for counts in figures.values()) >= KILLS
