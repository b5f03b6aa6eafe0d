"""Two clones of one checkpoint are treated as two models if they differ in any field of ComfyUI's ModelPatcher.

Each difference affects only its model: in the blend, in a search of SeedSelect and in the gradient of SeedSelect.
"""

import ast
import inspect
import textwrap

import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import PatcherInjection

from chorus.host.patcher_differences import FIELDS, FORWARD, MODULE, same_forward, same_module, same_value
from chorus.tests.support.gradients import direction_of, finite_difference, gradient, loss_of, seed_sampler, session
from chorus.tests.support.tiers import covering
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    forwards,
    in_inference_mode,
    ksample,
    lora,
    lora_weights,
    unet,
)

PROMPTS = conditioning(10), conditioning(20)
LAYER = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v"
LEFT_HALF = torch.zeros(1, 16, 16)
LEFT_HALF[..., :8] = 1.0


def test_every_field_that_comfyui_clones_is_in_the_table():
    """The test fails if a newer ComfyUI copies a new field: decide what it means for a blend, then add it to FIELDS."""
    source = textwrap.dedent(inspect.getsource(comfy.model_patcher.ModelPatcher.clone))
    copied = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "n":
            copied.add(node.attr)
    arguments = set(inspect.signature(comfy.model_patcher.ModelPatcher.__init__).parameters) - {"self"}
    assert copied | arguments <= FIELDS.keys() | {"load_device", "offload_device"}
    assert not {name for name in FIELDS if not hasattr(unet(0), name)}


@in_inference_mode
def scaled_layer(model, factor):
    """Object patch: a layer with other weights."""
    out, original = model.clone(), model.model.get_submodule(LAYER)
    layer = torch.nn.Linear(original.in_features, original.out_features, bias=False)
    layer.weight = torch.nn.Parameter(original.weight * factor, requires_grad=False)
    out.add_object_patch(LAYER, layer)
    return out


@in_inference_mode
def weight_wrapper(model, factor):
    out = model.clone()
    out.add_weight_wrapper(f"{LAYER}.weight", lambda weight: weight * factor)
    return out


@in_inference_mode
def injected(model, factor):
    """Injection that looks up its layer in the patcher passed to it."""
    out = model.clone()

    def inject(patcher):
        layer = patcher.model.get_submodule(LAYER)
        forward = layer.forward
        layer.forward = lambda x: forward(x) * factor

    def eject(patcher):
        vars(patcher.model.get_submodule(LAYER)).pop("forward", None)

    out.set_injections("scale", [PatcherInjection(inject, eject)])
    return out


@in_inference_mode
def bypass_lora(model, seed):
    """ComfyUI's bypass LoRA, whose injection holds the layers of the module it was made for."""
    return comfy.sd.load_bypass_lora_for_models(model, None, lora_weights(model, seed), 1.0, 0.0)[0]


@in_inference_mode
def function_wrapper(model, factor):
    out = model.clone()
    out.set_model_unet_function_wrapper(lambda apply, a: apply(a["input"], a["timestep"], **a["c"]) * factor)
    return out


@in_inference_mode
def attention_override(model, factor):
    out = model.clone()
    override = lambda attention, *args, **kwargs: attention(*args, **kwargs) * factor  # noqa: E731
    out.model_options["transformer_options"]["optimized_attention_override"] = override
    return out


@in_inference_mode
def network_wrapper(model, factor):
    out = model.clone()
    out.add_wrapper_with_key(
        "diffusion_model", "scale", lambda executor, *args, **kwargs: executor(*args, **kwargs) * factor
    )
    return out


@in_inference_mode
def attachment(model, factor):
    """The wrapper is the same on both models. It reads an attachment of the patcher that is running."""
    out = model.clone()
    out.set_attachments("factor", factor)
    out.remove_wrappers_with_key("apply_model", "attached")
    out.add_wrapper_with_key("apply_model", "attached", scale_by_attachment)
    return out


def scale_by_attachment(executor, *args, **kwargs):
    return executor(*args, **kwargs) * executor.class_obj.current_patcher.attachments["factor"]


CHANGES = {
    "patches": lora,
    "object_patches": scaled_layer,
    "weight_wrapper_patches": weight_wrapper,
    "injections": injected,
    "injections of a bypass LoRA": bypass_lora,
    "model_options": function_wrapper,
    "model_options: attention override": attention_override,
    "wrappers": network_wrapper,
}
VALUES = 1.1, 0.9
PLAIN = 1.0  # the attachment of a model without a change


def changed(name, model):
    """Two clones of ``model``, each with its own change of the kind ``name``."""
    if name in ("patches", "injections of a bypass LoRA"):
        return [CHANGES[name](model, seed) for seed in (1, 2)]
    return [{**CHANGES, "attachments": attachment}[name](model, value) for value in VALUES]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@covering(places=["expert", "base", "both"], name=[*CHANGES, "attachments"])
def test_change_acts_only_on_its_model(name, places):
    plain = unet(0) if name != "attachments" else attachment(unet(0), PLAIN)
    first, second = changed(name, plain)
    base = first if places in ("base", "both") else plain
    expert = second if places in ("expert", "both") else plain
    alone = [ksample(m, *PROMPTS, steps=1) for m in (expert, base)]
    assert relative(*alone) > 1e-4, "the change has no effect on the image"
    blended, _ = blend(base, expert, region=LEFT_HALF, region_mode="force")
    found = ksample(blended, *PROMPTS, steps=1)
    torch.testing.assert_close(found[..., :8], alone[0][..., :8], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[..., 8:], alone[1][..., 8:], atol=1e-4, rtol=1e-4)
    for model, before in ((expert, alone[0]), (base, alone[1])):
        assert torch.equal(ksample(model, *PROMPTS, steps=1), before), "the blend has changed a model"


@pytest.mark.parametrize("name", CHANGES)
def test_models_with_a_change_are_not_batched_together(name):
    first, second = changed(name, unet(0))
    blended, _ = blend(first, second)
    with forwards(first) as rows:
        ksample(blended, *PROMPTS, steps=1)
    assert max(rows, default=2) == 2, "the models were batched together: a batch of both has four rows"


@pytest.mark.parametrize("name", CHANGES)
def test_table_distinguishes_the_clones(name):
    field = name.split(" ")[0].removesuffix(":")
    first, second = changed(name, unet(0))
    differ = {MODULE: not same_module(first, second), FORWARD: not same_forward(first, second)}
    assert differ[FIELDS[field][0]]
    assert same_module(first, first.clone()) and same_forward(first, first.clone())


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_search_and_gradient_use_the_change_of_each_model(name):
    """Each model generates one half of the latent, so that the gradient depends on the changes of both."""
    plain = unet(0)
    first, second = changed(name, plain)
    blended, _ = blend(first, second, region=LEFT_HALF, region_mode="force")
    run = seed_sampler(blended, words=PROMPTS, steps=2)
    loss, found = gradient(run)
    direction = direction_of(found)
    along = float((found.double() * direction.double()).sum())
    assert along == pytest.approx(finite_difference(run, direction), rel=2e-2)
    searched = session(run, lambda s: s.generate(run.noise_of(3), 1), gradients=False)
    assert float(loss_of(searched)) == pytest.approx(float(loss), rel=1e-4)
    for base, expert in ((plain, second), (first, plain)):
        without, _ = blend(base, expert, region=LEFT_HALF, region_mode="force")
        other, _ = gradient(seed_sampler(without, words=PROMPTS, steps=2))
        assert abs(float(loss) - float(other)) > 1e-3 * abs(float(loss)), "one of the changes has no effect on the loss"


def test_same_attention_override_on_both_models_is_batched():
    model = attention_override(unet(0), 1.5)
    blended, _ = blend(model, model.clone(), positive=conditioning(11))
    with forwards(model) as rows:
        ksample(blended, *PROMPTS, steps=1)
    assert max(rows) == 4


def test_two_nodes_with_equal_inputs_make_the_same_function():
    def make(value):
        return lambda x: x * value

    assert same_value(make(2.0), make(2.0)) and not same_value(make(2.0), make(3.0))
    tensor = torch.zeros(2)
    assert same_value({"a": [make(tensor)]}, {"a": [make(tensor)]})
    assert not same_value({"a": [make(tensor)]}, {"a": [make(tensor.clone())]})
    assert not same_value(make(2.0), lambda x: x)


def test_functions_that_enclose_themselves_are_compared_in_finite_time():
    def make():
        def countdown(n):
            return n and countdown(n - 1)

        return countdown

    assert not same_value(make(), make())
