"""SeedSelect, the blend, a head, a refiner and the token sampler with ComfyUI's start options for precision and memory.

Each option runs in a separate process and is compared with a run without options. An option also changes the results of
ComfyUI's KSampler and VAE Decode. The size of this change limits how far the results of the nodes may deviate.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "support" / "start_options.py"
SAMPLED = ["--bf16-unet", "--force-fp16 --fp16-vae --fp16-intermediates --fp16-text-enc"]
OPTIONS = [
    "--fp16-intermediates",
    *("--force-fp32", "--force-fp16", "--fp32-unet", "--fp64-unet", "--fp16-unet"),
    *("--fp8_e4m3fn-unet", "--fp8_e5m2-unet", "--fp16-vae", "--bf16-vae", "--fp32-vae", "--cpu-vae"),
    *("--fp8_e4m3fn-text-enc", "--fp8_e5m2-text-enc", "--fp16-text-enc", "--bf16-text-enc", "--fp32-text-enc"),
    *("--force-channels-last", "--supports-fp8-compute", "--deterministic", "--fast", "--force-non-blocking"),
    *("--use-split-cross-attention", "--use-quad-cross-attention", "--use-pytorch-cross-attention"),
    *("--force-upcast-attention", "--dont-upcast-attention", "--disable-smart-memory", "--disable-pinned-memory"),
    *(
        "--async-offload",
        "--disable-async-offload",
        "--reserve-vram 1",
        "--enable-dynamic-vram",
        "--disable-dynamic-vram",
    ),
    *("--fast-disk", "--disable-mmap", "--mmap-torch-files", "--cache-none", "--cache-classic", "--high-ram"),
]
ROUNDING = 1e-5  # relative deviation of float32 results that are summed in another order
AMPLIFIED = 6.0  # limit relative to the deviation of one model; a blend deviates by up to 4 times as much
WIDE = 1e-2  # only options with 8-bit weights cause larger deviations, because they change the networks themselves


def results(options, folder):
    path = folder / "results.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(path), "--cpu", *options.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return results("", tmp_path_factory.mktemp("plain"))


def off(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def cosine(a, b):
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(o, marks=pytest.mark.slow) for o in SAMPLED),
        *(pytest.param(o, marks=pytest.mark.exhaustive) for o in OPTIONS),
    ],
)
def test_start_option_changes_results_only_by_its_precision(options, plain, tmp_path):
    found = results(options, tmp_path)
    assert all(v.isfinite().all() for v in found.values())
    # KSampler with the selected seed generates the selected latent
    assert torch.equal(found["search again"], found["search samples"])
    precision = max(ROUNDING, *(off(found[k], plain[k]) for k in ("plain", "image")))
    limit = AMPLIFIED * precision
    for name in ("blend", "head", "refiner"):
        assert off(found[name], plain[name]) <= limit, name
    if torch.equal(found["search seed"], plain["search seed"]):
        assert off(found["search samples"], plain["search samples"]) <= limit
    else:
        assert precision > WIDE
    # The optimiser's first step changes each number by the learning rate, even where the gradient is so small that
    # rounding determines its direction. Therefore only the direction of the noise's whole change is compared.
    change, expected = (r["optimize noise"].float() - r["optimize start"].float() for r in (found, plain))
    assert found["scores"][1] < 0.9 * found["scores"][0]
    differing = float((found["tokens"] != plain["tokens"]).float().mean())
    if precision == ROUNDING:
        assert cosine(change, expected) > 0.9999
        assert torch.allclose(found["scores"], plain["scores"], rtol=1e-3)
        assert differing == 0.0
    elif precision <= WIDE:
        assert cosine(change, expected) > 0.9
        assert torch.allclose(found["scores"], plain["scores"], rtol=0.15)
        assert differing <= 0.1
    else:
        assert differing <= 0.6
