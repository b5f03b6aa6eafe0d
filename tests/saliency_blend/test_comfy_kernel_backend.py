"""Who decides which implementation of the kernels runs: the variable, then ComfyUI's flag."""

import pytest
from comfy.cli_args import args

from chorus.techniques.saliency_blend.comfy_kernel_backend import VARIABLE, kernel_backend
from chorus.tests.support.tiny_models import blend, conditioning, ksample, unet

WORDS = conditioning(1), conditioning(2)


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(args, "disable_triton_backend", False)


def test_auto_unless_told_otherwise():
    assert kernel_backend() == "auto"


def test_comfyuis_flag_forbids_triton(monkeypatch):
    monkeypatch.setattr(args, "disable_triton_backend", True)
    assert kernel_backend() == "torch"


@pytest.mark.parametrize("forced", ["auto", "triton", "torch", "Torch"])
@pytest.mark.parametrize("disabled", [False, True])
def test_the_variable_decides_over_the_flag(monkeypatch, forced, disabled):
    monkeypatch.setattr(args, "disable_triton_backend", disabled)
    monkeypatch.setenv(VARIABLE, forced)
    assert kernel_backend() == forced.lower()


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"{VARIABLE} is 'cuda'; it may be auto, triton or torch"):
        kernel_backend()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sampling_uses_what_was_decided(monkeypatch, backend):
    seen = []
    from chorus.techniques.saliency_blend import blend as technique

    real = technique.saliency_blend

    def spy(*inputs, **options):
        seen.append(options["backend"])
        return real(*inputs, **{**options, "backend": "torch"})

    monkeypatch.setattr(technique, "saliency_blend", spy)
    monkeypatch.setenv(VARIABLE, backend)
    ksample(blend(unet(0), unet(1))[0], *WORDS, steps=2)
    assert seen == [backend] * 2
