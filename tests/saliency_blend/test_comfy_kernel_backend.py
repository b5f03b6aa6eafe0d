"""Choice of the kernels' backend: the environment variable overrides ComfyUI's flag, and the default is auto."""

import pytest
from comfy.cli_args import args

from chorus.techniques.saliency_blend.comfy_kernel_backend import VARIABLE, kernel_backend
from chorus.tests.support.tiny_models import blend, conditioning, ksample, unet

PROMPTS = conditioning(1), conditioning(2)


@pytest.fixture(autouse=True)
def clear_settings(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(args, "disable_triton_backend", False)


def test_default_is_auto():
    assert kernel_backend() == "auto"


def test_comfyui_flag_disables_triton(monkeypatch):
    monkeypatch.setattr(args, "disable_triton_backend", True)
    assert kernel_backend() == "torch"


@pytest.mark.parametrize("forced", ["auto", "triton", "torch", "Torch"])
@pytest.mark.parametrize("disabled", [False, True])
def test_variable_overrides_the_flag(monkeypatch, forced, disabled):
    monkeypatch.setattr(args, "disable_triton_backend", disabled)
    monkeypatch.setenv(VARIABLE, forced)
    assert kernel_backend() == forced.lower()


def test_unknown_value_rejected(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"{VARIABLE} is 'cuda'; set it to auto, triton or torch"):
        kernel_backend()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sampling_uses_the_chosen_backend(monkeypatch, backend):
    seen = []
    from chorus.techniques.saliency_blend import rows as technique

    real = technique.saliency_blend

    def spy(*inputs, **options):
        seen.append(options["backend"])
        return real(*inputs, **{**options, "backend": "torch"})

    monkeypatch.setattr(technique, "saliency_blend", spy)
    monkeypatch.setenv(VARIABLE, backend)
    ksample(blend(unet(0), unet(1))[0], *PROMPTS, steps=2)
    assert seen == [backend] * 2
