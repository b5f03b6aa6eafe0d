"""``python run.py train-demo --smoke``: all stages from scratch, including the download of the emoji."""

import os
import subprocess
import sys

import pytest

from chorus.dev.recipes import chain
from tests.conftest import HOST, ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_stages_run_from_scratch(tmp_path):
    environment = {**os.environ, "COMFYUI_PATH": str(HOST), "CHORUS_EMOJI_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = str(HOST)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run; sys.path.remove({str(ROOT)!r});"
        "from chorus.dev.recipes.__main__ import main; sys.exit(main(['--smoke']))"
    )
    before = set((ROOT / "demo").rglob("*"))
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"smoke test of {len(chain.STAGES)} stages" in result.stdout
    assert len(list(tmp_path.glob("*.tgz"))) == 2  # both packages were downloaded
    assert {p for p in set((ROOT / "demo").rglob("*")) - before if "__pycache__" not in p.parts} == set()
