"""The client of a ComfyUI server, with workflows of ComfyUI's own nodes."""

import pytest
from PIL import Image

from chorus.dev.tools.client import WorkflowError
from chorus.dev.tools.run_workflows import main, run_file

RED = 0xFF0000


def blurred_image(color: int = RED, blur: int = 1) -> dict:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 2, "color": color}},
        "2": {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": blur, "sigma": 1.0}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "client"}},
    }


# the same workflow in the UI format, with a note and a muted node that must not run
WORKFLOW = """{
  "nodes": [
    {"id": 1, "type": "EmptyImage", "mode": 0, "inputs": [], "widgets_values": [8, 8, 1, COLOR],
     "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1, 2]}]},
    {"id": 2, "type": "ImageBlur", "mode": 0, "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
     "widgets_values": [BLUR, 1.0], "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [3]}]},
    {"id": 3, "type": "SaveImage", "mode": 0, "inputs": [{"name": "images", "type": "IMAGE", "link": 3}],
     "widgets_values": ["red"], "outputs": []},
    {"id": 4, "type": "SaveImage", "mode": 2, "inputs": [{"name": "images", "type": "IMAGE", "link": 2}],
     "widgets_values": ["muted"], "outputs": []},
    {"id": 5, "type": "Note", "mode": 0, "inputs": [], "widgets_values": ["a note"], "outputs": []}
  ],
  "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 1, 0, 4, 0, "IMAGE"], [3, 2, 0, 3, 0, "IMAGE"]],
  "groups": [], "config": {}, "extra": EXTRA, "version": 0.4, "last_node_id": 5, "last_link_id": 3
}"""


def workflow_file(folder, name: str, color: int = RED, blur: int = 1, extra: str = "{}"):
    file = folder / f"{name}.json"
    file.write_text(WORKFLOW.replace("COLOR", str(color)).replace("BLUR", str(blur)).replace("EXTRA", extra))
    return file


def test_run_returns_images_events_and_time(client):
    result = client.run(blurred_image())
    images = client.images(result)
    assert result.status == "success" and result.seconds > 0
    assert [node for node, _, _ in images] == ["3", "3"]
    assert images[0][2].startswith(b"\x89PNG")
    assert {"execution_start", "executing", "executed", "execution_success"} <= {kind for kind, _ in result.events}


def test_run_reports_cached_nodes(client):
    client.run(blurred_image(color=1))
    assert {"1", "2"} <= client.run(blurred_image(color=1)).cached()


def test_error_of_rejected_workflow_names_node_value_and_limit(client):
    with pytest.raises(WorkflowError, match=r"node 2 \(ImageBlur\): .*1000.*31"):
        client.run(blurred_image(blur=1000))


def test_error_names_the_failed_node(client):
    with pytest.raises(WorkflowError, match=r"node 2 \(ImageBlur\): RuntimeError: .*[Pp]adding"):
        client.run(blurred_image(blur=31))  # valid, but the padding exceeds the image


@pytest.mark.slow
def test_images_are_saved_under_numbered_names(client, tmp_path, capsys):
    file = workflow_file(tmp_path, "Two reds")
    for _ in range(2):
        run_file(client, file, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["Two reds - red_00001.png", "Two reds - red_00002.png"]
    assert Image.open(tmp_path / "Two reds - red_00002.png").getpixel((4, 4))[0] > 250
    assert "Two reds - red_00002.png" in capsys.readouterr().out


@pytest.mark.slow
def test_failed_workflow_does_not_stop_the_others(server, tmp_path, capsys):
    files = [workflow_file(tmp_path, "Bad", blur=1000), workflow_file(tmp_path, "Good")]
    assert main(server.address, str(tmp_path / "out"), *map(str, files)) == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Good - red_00001.png", "index.html"]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert 'src="Good%20-%20red_00001.png"' in page and "Failed: node 2 (ImageBlur)" in page
    assert "Bad failed: node 2 (ImageBlur)" in capsys.readouterr().err


def test_workflow_that_needs_a_download_is_skipped(server, tmp_path, capsys):
    file = workflow_file(tmp_path, "Big", extra='{"chorus": {"needs": ["big.safetensors"]}}')
    assert main(server.address, str(tmp_path / "out"), str(file)) == 0
    assert "Big: skipped, it needs big.safetensors" in capsys.readouterr().out
