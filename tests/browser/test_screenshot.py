"""dev/tools/screenshot.py: the picture of a workflow, of some of its nodes, and what it refuses."""

import json

import numpy as np
import pytest

from chorus.dev.tools.screenshot import screenshot
from chorus.dev.tools.setup import ROOT

WORKFLOW = ROOT / "example_workflows" / "Refine faces.json"  # not run: it needs a model


@pytest.fixture
def small(tmp_path):
    """A workflow of two nodes, far from each other: one saves a red picture, the other is a note."""
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


def red(picture) -> float:
    """The share of pixels that are of the colour of the small workflow's picture."""
    return np.all(abs(np.asarray(picture, dtype=int) - (255, 0, 0)) < 15, axis=-1).mean()


def test_whole_graph_after_its_run(server, browser, small):
    picture = screenshot(browser, server.address, small)
    assert picture.height == 1600 and picture.width < 1000  # as far as the note
    assert red(picture) > 0.002


def test_some_nodes_fill_the_picture(server, browser, small):
    picture = screenshot(browser, server.address, small, [2])
    assert picture.width < 900 and picture.height == 1000
    assert red(picture) > 0.1


def test_not_run_without_its_model(server, browser, capsys):
    picture = screenshot(browser, server.address, WORKFLOW)
    assert picture.width == 1600
    assert "not run" in capsys.readouterr().out


def test_unknown_node_and_failed_run(server, browser, small):
    with pytest.raises(ValueError, match=r"no node \[7\]; choose from \[1, 2, 3\]"):
        screenshot(browser, server.address, small, [1, 7])
    small.write_text(small.read_text().replace("[256, 256, 1, 16711680]", "[256, 256, 0, 16711680]"))
    with pytest.raises(RuntimeError, match=r"small\.json did not run"):
        screenshot(browser, server.address, small)
