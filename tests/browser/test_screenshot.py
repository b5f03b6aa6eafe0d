"""dev/tools/screenshot.py: screenshots of a workflow or of some of its nodes, and errors."""

import json

import numpy as np
import pytest

from chorus.dev.tools.screenshot import screenshot
from chorus.dev.tools.setup import ROOT

WORKFLOW = ROOT / "example_workflows" / "Refine faces.json"  # cannot run, because its model is missing


@pytest.fixture
def small(tmp_path):
    """A workflow that previews a red image and has a note far away."""
    empty = {"inputs": [], "outputs": [], "mode": 0, "flags": {}, "properties": {}, "order": 0}
    image = [{"name": "IMAGE", "type": "IMAGE", "links": [1]}]
    nodes = [
        {
            **empty,
            "id": 1,
            "type": "EmptyImage",
            "pos": [0, 0],
            "size": [270, 130],
            "widgets_values": [256, 256, 1, 0xFF0000],
        },
        {**empty, "id": 2, "type": "PreviewImage", "pos": [400, 0], "size": [270, 300]},
        {
            **empty,
            "id": 3,
            "type": "MarkdownNote",
            "pos": [0, 2000],
            "size": [270, 130],
            "widgets_values": ["far away"],
        },
    ]
    nodes[0]["outputs"] = image
    nodes[1]["inputs"] = [{"name": "images", "type": "IMAGE", "link": 1}]
    content = {"last_node_id": 3, "last_link_id": 1, "nodes": nodes, "links": [[1, 1, 0, 2, 0, "IMAGE"]], "groups": []}
    file = tmp_path / "small.json"
    file.write_text(json.dumps({**content, "config": {}, "extra": {}, "version": 0.4}))
    return file


def red_share(image) -> float:
    """Fraction of pixels with the colour of the small workflow's image."""
    return np.all(abs(np.asarray(image, dtype=int) - (255, 0, 0)) < 15, axis=-1).mean()


def test_screenshot_shows_the_whole_graph_after_a_run(server, browser, small):
    image = screenshot(browser, server.address, small)
    assert image.height == 1600 and image.width < 1000  # the screenshot extends to the note
    assert red_share(image) > 0.002


def test_selected_nodes_fill_the_screenshot(server, browser, small):
    image = screenshot(browser, server.address, small, [2])
    assert image.width < 900 and image.height == 1000
    assert red_share(image) > 0.1


def test_workflow_without_its_model_is_not_run(server, browser, capsys):
    image = screenshot(browser, server.address, WORKFLOW)
    assert image.width == 1600
    assert "not run" in capsys.readouterr().out


def test_unknown_node_and_failed_run_raise(server, browser, small):
    with pytest.raises(ValueError, match=r"no node \[7\]; choose from \[1, 2, 3\]"):
        screenshot(browser, server.address, small, [1, 7])
    small.write_text(small.read_text().replace("[256, 256, 1, 16711680]", "[256, 256, 0, 16711680]"))
    with pytest.raises(RuntimeError, match=r"small\.json did not run"):
        screenshot(browser, server.address, small)
