"""``bench gpu --smoke`` as run.py starts it, with both parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chorus.dev.benchmarks import fusion_case
from chorus.dev.tools import setup


@pytest.mark.parametrize(
    ("settings", "same_batches", "words"),
    [
        ({}, True, "cfg 5"),
        ({"cfg": 1.0}, False, "cfg 1"),
        ({"refresh": 3}, False, "cfg 5, refresh 3"),
    ],
)
def test_title_names_the_settings(settings, same_batches, words):
    setting = fusion_case.Setting("sdxl", 128, 10, "bf16", 1, **settings)
    assert setting.title == (
        "two SDXL-sized checkpoints of 2567 M random parameters, bf16, latent 128 x 128, batch 1, euler, steps: 10, "
        + words
    )
    assert setting.same_batches == same_batches


@pytest.mark.slow
def test_smoke_run_measures_every_section(tmp_path):
    file = tmp_path / "result.json"
    host = setup.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), None)
    command = setup.module(host, "chorus.dev.benchmarks.gpu", "--smoke", "--output", str(file))
    done = subprocess.run(command, cwd=setup.ROOT, env=setup.environment(host), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["smoke"] and result["parts"] == ["kernels", "host"]
    outcomes = {one["name"]: one["status"] for one in result["sections"]}
    assert set(outcomes.values()) == {"measured"}, outcomes
    for name in ("blend against float64", "tiny U-ViT", "cost of the blend, sd15 fp32, refresh 3"):
        assert name in outcomes and f"## {name}" in done.stdout
    (blend,) = (one["found"]["rows"] for one in result["sections"] if one["name"] == "blend against float64")
    assert {row["implementation"] for row in blend} == {"torch", "Triton, one launch", "Triton, three launches"}
    costs = {one["name"]: one["found"]["rows"] for one in result["sections"] if one["kind"] == "cost"}
    # 4 steps; at cfg 1 the base alone predicts one row per step, and the blend two rows per model
    assert costs["cost of the blend, sd15 fp32, cfg 1"] == {"base": 4, "expert": 4, "fusion": 16}
    # with refresh 3 the expert predicts at steps 1 and 4
    assert costs["cost of the blend, sd15 fp32, refresh 3"] == {"base": 8, "expert": 8, "fusion": 12}
    assert str(tmp_path) not in file.read_text(encoding="utf-8")  # names of folders are private
