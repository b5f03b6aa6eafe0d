"""A process that is killed while it saves leaves no half file under a name that is offered.

That is what SIGKILL shows. Of a power cut nothing is shown here: files of safetensors are forced to the disk before they
get their name, pairs of pictures are not, and what a disk itself loses no program sees.
"""

import os

import pytest

from chorus.tests.robustness.worker import working

KILLS = 7  # of each of the six savers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_no_half_file_is_left(tmp_path, record_property):
    with working(tmp_path, {"kills": KILLS}) as result:
        found = result("kills")
    assert not found["wrong"], "\n".join(found["wrong"])
    figures = found["savers"]
    for name, counts in figures.items():
        record_property(name, counts)
        assert counts["kills"] == KILLS
    # else the moments were none of those that matter
    assert sum(counts["left"] for counts in figures.values()) >= KILLS
    assert sum(counts["loaded"] for counts in figures.values()) >= KILLS
