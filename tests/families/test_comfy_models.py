"""Small models of every model family of this ComfyUI: complete, small, finite, and different for different prompts."""

import pytest
import torch

from chorus.host.host_version import TESTED, is_newer_than_tested
from chorus.tests.families.catalogue import FAMILIES, NOT_BUILT, host_classes, missing
from chorus.tests.families.family import LIMIT
from chorus.tests.support.tiny_models import ksample

pytestmark = pytest.mark.usefixtures("one_thread")


def parts(samples):
    return samples.unbind() if samples.is_nested else [samples]


def test_every_family_has_a_small_model_or_a_reason():
    if missing() and is_newer_than_tested():
        pytest.xfail(f"docs/compatibility.md describes ComfyUI {TESTED}; new families: {', '.join(missing())}")
    assert not missing(), (
        f"this ComfyUI has new model families: {', '.join(missing())}; add small models to tests/families/catalogue.py,"
        " then run `python run.py families --write`"
    )
    known = [*(family.class_name for family in FAMILIES.values()), *NOT_BUILT]
    gone = [name for name in known if name not in host_classes()]
    assert not gone, f"this ComfyUI has no {', '.join(gone)}; remove it from tests/families/catalogue.py"


@pytest.mark.slow  # half a minute for all
@pytest.mark.parametrize("name", FAMILIES)
def test_model_is_small_and_follows_its_prompt(name):
    family = FAMILIES[name]
    model = family.model(0)
    assert sum(p.numel() for p in model.model.parameters()) < LIMIT
    assert all(torch.isfinite(tensor).all() for tensor in model.model.state_dict().values())
    negative = family.conditioning(11)
    first, second = (
        ksample(model, family.conditioning(seed), negative, family.latent(), steps=2, scheduler="simple", cfg=4.0)
        for seed in (10, 12)
    )
    for a, b in zip(parts(first), parts(second), strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() > 1e-4 * a.norm()
