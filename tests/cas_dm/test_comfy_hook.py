"""Tests of a head on a MODEL: results with real samplers, rejected models, loading and unloading, files."""

import gc
import inspect
import logging
import pickle
import weakref
from pathlib import Path

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_management
import comfy.ops
import comfy_extras.nodes_model_advanced
import folder_paths
import pytest
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

from chorus.nodes import cas_dm
from chorus.techniques.cas_dm import comfy_files, comfy_hook
from chorus.techniques.cas_dm.comfy_files import FILES
from chorus.techniques.cas_dm.comfy_hook import head_count, prediction_of
from chorus.techniques.cas_dm.mix import amplitudes, noise_level
from chorus.techniques.cas_dm.network import CasDMHeadConfig, CasDMHeadNet, Head, to_file
from chorus.tests.support.gradients import direction_of, finite_difference, gradient, seed_sampler
from chorus.tests.support.heads import EXPERT_PROMPTS, MODELS, PROMPTS, apply_head, head_for, sample
from chorus.tests.support.lifecycle import interrupt_at
from chorus.tests.support.tiers import covering, quick
from chorus.tests.support.tiny_models import (
    blend,
    controlnet,
    flux,
    forwards,
    in_inference_mode,
    ksample,
    lora,
    recording,
    unet,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def record_head(model, head, **inputs):
    """``model`` with ``head``, recording every prediction before and after it."""
    recorded, before = recording(model)
    recorded, after = recording(apply_head(recorded, head, **inputs))
    return recorded, before, after


def expected_x0(head, call, flow, strength=1.0):
    """The x̂ that the head should return for a recorded call, computed from its formula with plain torch layers."""
    signal, noise = amplitudes(call.sigma, flow)
    scale = (signal**2 + noise**2).sqrt()[:, None, None, None]
    with torch.inference_mode():
        x_phi, r = head.network()(call.denoised, noise_level(signal, noise), call.x / scale)
    return call.denoised + strength * (r * x_phi + (1 - r) * call.denoised - call.denoised)


@covering(cfg=[5.0, 1.0], kind=[*MODELS])
def test_untrained_head_changes_nothing(kind, cfg):
    model = MODELS[kind]()
    head = head_for(model, size=0.0, cfg=cfg)
    torch.testing.assert_close(sample(apply_head(model, head), cfg=cfg), sample(model, cfg=cfg), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "sampler",
    quick(
        ["euler_ancestral", "uni_pc", "euler_cfg_pp"],
        ["euler_ancestral", "dpmpp_2m", "uni_pc", "ddim", "heun", "euler_cfg_pp", "dpmpp_sde"],
    ),
)
def test_head_refines_with_any_sampler(sampler):
    model = unet(0)
    plain = sample(model, sampler=sampler)
    assert torch.equal(sample(apply_head(model, head_for(model, size=0.0)), sampler=sampler), plain)
    recorded, before, after = record_head(model, head := head_for(model))
    assert not torch.allclose(sample(recorded, sampler=sampler), plain, rtol=1e-2)
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a.denoised, expected_x0(head, b, flow=False), rtol=1e-4, atol=1e-4)


@covering(
    config=[{}, {"condition_on_x_t": True, "gate": "channel"}, {"gate": "sample"}, {"gate": "fixed"}], kind=[*MODELS]
)
def test_sampler_receives_the_mix(kind, config):
    model = MODELS[kind]()
    head = head_for(model, **config)
    recorded, before, after = record_head(model, head, strength=0.7)
    sample(recorded, size=(13, 7) if kind != "flux" else (12, 10))
    assert len(before) == 3
    # only the first step: at the end of a flow model there is almost no noise to correct
    assert not torch.allclose(after[0].denoised, before[0].denoised, rtol=1e-2, atol=1e-2)
    for b, a in zip(before, after, strict=True):
        expected = expected_x0(head, b, kind in ("flow", "flux"), strength=0.7)
        torch.testing.assert_close(a.denoised, expected, rtol=1e-4, atol=1e-4)


@covering(
    kind=[*MODELS],
    neutral_inputs=[
        dict(strength=0.0),
        dict(start_percent=0.4, end_percent=0.4),
        dict(start_percent=0.8, end_percent=0.1),
    ],
)
def test_neutral_inputs_are_exact_and_load_nothing(kind, neutral_inputs):
    model = MODELS[kind]()
    patched = apply_head(model, head_for(model), **neutral_inputs)
    assert patched is not model and head_count(patched) == 0
    assert torch.equal(sample(patched), sample(model))


@covering(window=[(0.0, 0.3), (0.3, 0.7), (0.7, 1.0)], kind=["eps", "flow"])
def test_head_acts_only_in_its_window(kind, window):
    model = MODELS[kind]()
    recorded, before, after = record_head(model, head_for(model), start_percent=window[0], end_percent=window[1])
    sample(recorded, steps=8, sampler="dpm_2")  # predicts twice per step, at different sigmas
    first, last = (model.get_model_object("model_sampling").percent_to_sigma(p) for p in window)
    acted = [not torch.equal(b.denoised, a.denoised) for b, a in zip(before, after, strict=True)]
    assert acted == [last < float(b.sigma[0]) <= first for b in before]
    assert 0 < sum(acted) < len(acted) > 8


def test_window_without_a_step_is_exact():
    model = unet(0)
    patched = apply_head(model, head_for(model), start_percent=0.999, end_percent=1.0)
    assert head_count(patched) == 1
    assert torch.equal(sample(patched, denoise=1.0, scheduler="sgm_uniform"), sample(model, scheduler="sgm_uniform"))


def test_heads_chain_in_order():
    model = unet(0)
    first, second = head_for(model, 1), head_for(model, 2, size=0.6)
    recorded, before, between = record_head(model, first)
    recorded, after = recording(apply_head(recorded, second, strength=0.5))
    assert head_count(recorded) == 2
    actual = sample(recorded)
    for b, m, a in zip(before, between, after, strict=True):
        torch.testing.assert_close(m.denoised, expected_x0(first, b, False), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.denoised, expected_x0(second, m, False, 0.5), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(actual, sample(apply_head(apply_head(model, second, 0.5), first)), rtol=1e-2)
    # branches of one graph are independent
    assert torch.equal(sample(apply_head(apply_head(model, first), second, 0.5)), actual)
    assert head_count(model) == 0


@pytest.mark.parametrize("expert", [lambda: unet(1), lambda: unet(1, "v")], ids=["eps", "v"])
def test_head_refines_a_blend(expert):
    base, expert = unet(0), expert()
    head = head_for(base)
    blended, trace = blend(base, expert, *EXPERT_PROMPTS)
    recorded, before, after = record_head(blended, head)
    actual = sample(recorded)
    assert trace.record.spent == [3, 3]
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a.denoised, expected_x0(head, b, False), rtol=1e-4, atol=1e-4)
    assert torch.equal(before[0].denoised, recorded_predictions(blended)[0].denoised)
    # a head that was added to the base before blending also refines the blend
    assert torch.equal(sample(blend(apply_head(base, head), expert, *EXPERT_PROMPTS)[0]), actual)
    assert torch.equal(sample(apply_head(blended, head, strength=0.0)), sample(blended))


def recorded_predictions(model):
    recorded, calls = recording(model)
    sample(recorded)
    return calls


def test_experts_of_one_checkpoint_stay_batched_with_a_head():
    base = unet(0)
    blended, _ = blend(base, base, *EXPERT_PROMPTS)
    with forwards(base) as rows:
        sample(blended)
        plain = list(rows)
        sample(apply_head(blended, head_for(base, size=0.0)))
    assert rows[len(plain) :] == plain


def test_head_on_an_expert_rejected():
    base, expert = unet(0), unet(1)
    with pytest.raises(ValueError, match="Cas-DM"):
        blend(base, apply_head(expert, head_for(expert)), *EXPERT_PROMPTS)


def test_lora_acts_before_the_head_in_any_order_of_nodes():
    model = unet(0)
    head = head_for(model)
    recorded, before, after = record_head(lora(model, 3), head)
    actual = sample(recorded)
    assert not torch.allclose(actual, sample(apply_head(model, head)), rtol=1e-2)
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a.denoised, expected_x0(head, b, False), rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(lora(apply_head(model, head), 3)), actual)


@in_inference_mode
def with_control(model, seed):
    net = controlnet(seed)
    hint = torch.rand(1, 96, 80, 3, generator=torch.Generator().manual_seed(seed)).movedim(-1, 1)
    control = net.copy().set_cond_hint(hint, 1.0, (0.0, 1.0))
    return tuple([[t, {**o, "control": control, "control_apply_to_uncond": False}] for t, o in w] for w in PROMPTS)


def test_controlnet_acts_before_the_head():
    model = unet(0)
    prompts, head = with_control(model, 5), head_for(model)
    assert not torch.allclose(sample(model, prompts), sample(model), rtol=1e-2)
    recorded, before, after = record_head(model, head)
    sample(recorded, prompts)
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a.denoised, expected_x0(head, b, False), rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(apply_head(model, head_for(model, size=0.0)), prompts), sample(model, prompts))


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_inpainting_keeps_the_unmasked_area(kind):
    model, mask = MODELS[kind](), torch.zeros(1, 12, 10)
    mask[:, :, 5:] = 1
    image = torch.randn(1, 4, 12, 10, generator=torch.Generator().manual_seed(4))
    content = {"samples": image, "noise_mask": mask}
    plain, refined = (ksample(m, *PROMPTS, content) for m in (model, apply_head(model, head_for(model))))
    assert torch.equal(refined[..., :5], plain[..., :5])
    torch.testing.assert_close(refined[..., :5], image[..., :5], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(refined[..., 5:], plain[..., 5:], rtol=1e-2)


def test_video_is_refined_frame_by_frame():
    model = unet(0)
    head = head_for(model)
    patched = apply_head(model, head)
    hook = patched.model_options["sampler_post_cfg_function"][-1]
    x0, x = torch.randn(2, 4, 3, 6, 5), torch.randn(2, 4, 3, 6, 5)
    args = dict(sigma=torch.full((2,), 1.5), model=model.model, cond_scale=5.0, model_options={})
    actual = hook(dict(args, denoised=x0, input=x))
    for t in range(3):
        assert torch.equal(actual[:, :, t], hook(dict(args, denoised=x0[:, :, t], input=x[:, :, t])))
    with pytest.raises(ValueError, match=r"or video \[B, C, T, H, W\], got 2x4x3;"):
        hook(dict(args, denoised=x0[..., 0, 0], input=x[..., 0, 0]))


INCOMPATIBLE = {
    "other latents": (
        lambda: unet(0, latent_format=comfy.latent_formats.SDXL),
        "SD15 latents .4 channels., this model has SDXL",
    ),
    "other channels": (lambda: flux(0), r"this model has Flux \(16 channels\); use a head of this format"),
    "v": (lambda: unet(0, "v"), "trained on a model that predicts eps, but this model predicts v"),
    "flow": (lambda: unet(0, "flow"), "predicts eps, but this model predicts flow"),
    "image to image": (lambda: unet(0, "img_to_img"), "the noise process .* is not supported"),
}


@pytest.mark.parametrize("model", INCOMPATIBLE)
@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_incompatible_model_rejected(model, strength):
    make, message = INCOMPATIBLE[model]
    with pytest.raises(ValueError, match=message):
        apply_head(make(), head_for(unet(0)), strength)


@in_inference_mode
def with_model_sampling(model, kind):
    return comfy_extras.nodes_model_advanced.ModelSamplingDiscrete().patch(model, kind, False)[0]


def test_model_sampling_nodes_change_the_prediction_type():
    model = unet(0)
    head = head_for(model)
    with pytest.raises(ValueError, match="predicts eps, but this model predicts v"):
        apply_head(with_model_sampling(model, "v_prediction"), head)
    with pytest.raises(ValueError, match="predicts eps, but this model predicts v"):
        sample(with_model_sampling(apply_head(model, head), "v_prediction"))
    assert prediction_of(with_model_sampling(model, "x0").get_model_object("model_sampling")) == "x0"


def test_other_guidance_scale_warns_once(caplog):
    model = unet(0)
    patched = apply_head(model, head_for(model, cfg=5.0))
    with caplog.at_level(logging.WARNING):
        sample(patched)
        assert "CasDMHead" not in caplog.text
        sample(patched, cfg=7.5)
        sample(patched, cfg=7.5)
    assert caplog.text.count("trained at cfg 5, but this run samples at cfg 7.5") == 1


def loaded():
    return [m.model.model for m in comfy.model_management.current_loaded_models]


def test_head_is_loaded_and_unloaded_with_the_model():
    model = unet(0)
    patched = apply_head(model, head_for(model))
    (patcher,) = patched.get_additional_models_with_key("chorus_cas_dm_0")
    seen = []
    patched.set_model_sampler_post_cfg_function(lambda args: seen.append(loaded()) or args["denoised"])
    sample(patched)
    assert all(any(m is patcher.model for m in models) and any(m is model.model for m in models) for models in seen)
    assert any(m is patcher.model for m in loaded())
    comfy.model_management.unload_model_and_clones(patched)
    assert not any(m is patcher.model or m is model.model for m in loaded())


def test_head_is_freed_with_its_model():
    model = unet(0)
    patched = apply_head(model, head_for(model))
    network = weakref.ref(patched.get_additional_models_with_key("chorus_cas_dm_0")[0].model)
    sample(patched)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(interrupt_at(patched, 2))
    assert set(model.model_options) == {"transformer_options"} and not model.additional_models
    del patched
    comfy.model_management.cleanup_models()
    gc.collect()
    assert network() is None
    assert torch.equal(sample(model), sample(unet(0)))


def test_head_works_with_offloaded_weights():
    model = unet(0)
    patched = apply_head(model, head_for(model))
    expected = sample(patched)
    (patcher,) = patched.get_additional_models_with_key("chorus_cas_dm_0")
    patcher.detach()
    patcher.load(torch.device("cpu"), lowvram_model_memory=1)
    assert patcher.model.model_lowvram
    assert torch.equal(sample(patched), expected)


def test_multigpu_copies_share_no_weights():
    patched = apply_head(unet(0), head_for(unet(0)))
    (patcher,) = patched.get_additional_models_with_key("chorus_cas_dm_0")
    with torch.inference_mode():
        copy = patcher.deepclone_multigpu()
    for original, copied in zip(patcher.model.parameters(), copy.model.parameters(), strict=True):
        assert torch.equal(original, copied) and original.data_ptr() != copied.data_ptr() and not copied.is_inference()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_seed_gradient_passes_through_the_head(kind):
    model = MODELS[kind]()
    patched = apply_head(model, head_for(model, condition_on_x_t=True))
    run = seed_sampler(patched)
    loss, grad = gradient(run)
    direction = direction_of(grad)
    slope = finite_difference(run, direction)
    assert float((grad * direction).sum()) == pytest.approx(slope, rel=2e-3)
    plain, without = gradient(seed_sampler(model))
    assert not torch.allclose(grad, without, rtol=1e-1) and loss != plain


@in_inference_mode
def test_seed_gradient_passes_through_inference_weights():
    """Another node pack may create a head in inference mode; its weights are then inference tensors."""
    model = unet(0)
    patched = apply_head(model, head_for(model))
    (patcher,) = patched.get_additional_models_with_key("chorus_cas_dm_0")
    expected = gradient(seed_sampler(patched))[1]
    for module in patcher.model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(p.clone(), requires_grad=False)
    assert all(p.is_inference() for p in patcher.model.parameters())
    torch.testing.assert_close(gradient(seed_sampler(patched))[1], expected)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders models/cas_dm, input and output."""
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    (tmp_path / "cas_dm").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "cas_dm", ([str(tmp_path / "cas_dm")], {".safetensors"}))
    folder_paths.filename_list_cache.pop("cas_dm", None)
    yield tmp_path
    folder_paths.filename_list_cache.pop("cas_dm", None)


@in_inference_mode
def save(head, prefix="cas_dm/head"):
    cas_dm.SaveCasDMHead.execute(head, prefix)


@in_inference_mode
def load(name):
    return cas_dm.LoadCasDMHead.execute(name).args[0]


def test_saved_head_loads_unchanged(folders):
    model = unet(0)
    head = head_for(model)
    save(head)
    (name,) = FILES.names()
    assert name == "cas_dm/head_00001_.cas_dm.safetensors [output]"
    assert cas_dm.LoadCasDMHead.validate_inputs(name) is True
    read = load(name)
    assert read.config == head.config and read.facts == head.facts
    assert not any(w.is_inference() for w in read.weights.values())
    torch.testing.assert_close(sample(apply_head(model, read)), sample(apply_head(model, head)), rtol=5e-2, atol=5e-2)
    # as if a user moved the file into the model folder, with any name
    FILES.find(name).rename(folders / "cas_dm" / "mine.safetensors")
    assert FILES.names() == ["mine.safetensors"]
    assert torch.equal(sample(apply_head(model, load("mine.safetensors"))), sample(apply_head(model, read)))


def test_file_with_uppercase_extension_is_listed_and_loads(folders):
    save(head_for(unet(0)))
    FILES.find(FILES.names()[0]).rename(folders / "cas_dm" / "MINE.SAFETENSORS")
    assert FILES.names() == ["MINE.SAFETENSORS"]
    assert cas_dm.LoadCasDMHead.validate_inputs("MINE.SAFETENSORS") is True
    assert load("MINE.SAFETENSORS").config


def test_saving_never_overwrites(folders):
    heads = [head_for(unet(0), seed) for seed in (1, 2)]
    for head in heads:
        save(head)
    first, second = FILES.names()
    for name, head in zip((first, second), heads, strict=True):
        assert torch.equal(load(name).weights["last.weight"], head.weights["last.weight"].half())
    prints = {cas_dm.LoadCasDMHead.fingerprint_inputs(name) for name in (first, second)}
    assert len(prints) == 2


def test_full_disk_leaves_no_file(folders, full_disk):
    with pytest.raises(OSError, match="No space left"):
        save(head_for(unet(0)))
    assert [p for p in (folders / "output").rglob("*") if p.is_file()] == []


def test_non_finite_head_is_not_saved(folders):
    head = head_for(unet(0))
    bad = Head(head.config, {**head.weights, "last.bias": torch.full((5,), torch.nan)}, head.facts)
    with pytest.raises(ValueError, match="not finite"):
        save(bad)
    assert not list((folders / "output").rglob("*.*"))


def write(folders, content, name="bad.safetensors"):
    path = folders / "cas_dm" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        safetensors.torch.save_file(*content[:1], path, metadata=content[1])
    return name


def changed(**metadata):
    tensors, facts = to_file(head_for(unet(0)))
    return tensors, {**facts, **metadata}


DAMAGED = {
    "pickle": (lambda: pickle.dumps({"last.weight": 1}, protocol=4), "it is a pickle with the wrong extension"),
    "zipped pickle": (lambda: b"PK\x03\x04" + bytes(100), "it is a pickle with the wrong extension"),
    "git lfs pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "cut off": (lambda: safetensors.torch.save(changed()[0])[:-10], "damaged or incomplete"),
    "empty": (lambda: b"", "it is empty"),
    "another network": (lambda: ({"a": torch.zeros(1)}, {"format": "pt"}), "not a Cas-DM head"),
    "no metadata": (lambda: ({"a": torch.zeros(1)}, None), "not a Cas-DM head"),
    "newer version": (lambda: changed(format="chorus-cas-dm-2"), "expected format 'chorus-cas-dm-1'"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_error_names_the_invalid_file(folders, damage):
    make, message = DAMAGED[damage]
    with pytest.raises(ValueError, match=rf"'bad\.safetensors' cannot be read.*{message}"):
        load(write(folders, make()))


@pytest.mark.parametrize(
    "name",
    [
        "none.safetensors",
        "../cas_dm/../secret.safetensors",
        "head.pt",
        "gone.cas_dm.safetensors [output]",
        "../x.cas_dm.safetensors [output]",
    ],
)
def test_missing_files_rejected(folders, name):
    (folders / "secret.safetensors").write_bytes(b"")
    (folders / "x.cas_dm.safetensors").write_bytes(b"")
    message = cas_dm.LoadCasDMHead.validate_inputs(name)
    assert isinstance(message, str) and name in message
    with pytest.raises(ValueError):
        load(name)
    assert cas_dm.LoadCasDMHead.validate_inputs(None) is True


def test_model_folder_is_registered():
    paths, endings = folder_paths.folder_names_and_paths["cas_dm"]
    assert str(Path(folder_paths.models_dir) / "cas_dm") in paths and endings == {".safetensors"}
    assert comfy_files.FOLDER == "cas_dm" and comfy_hook.KEY.startswith("chorus")


INPUTS = {
    "LoadCasDMHead": ["file"],
    "SaveCasDMHead": ["head", "filename_prefix"],
    "CasDMHead": ["model", "head", "strength", "start_percent", "end_percent"],
}


def test_node_schemas_match_the_design():
    schemas = {node.define_schema().node_id: (node, node.define_schema()) for node in cas_dm.NODES}
    assert {name: [i.id for i in schema.inputs] for name, (_, schema) in schemas.items()} == INPUTS
    for name, (node, schema) in schemas.items():
        assert [*inspect.signature(node.execute).parameters] == INPUTS[name]
        assert all(i.tooltip for i in schema.inputs) and schema.description
        assert schema.category in ("chorus", "chorus/train")
    assert [o.io_type for o in schemas["LoadCasDMHead"][1].outputs] == ["CAS_DM_HEAD"]
    assert [o.io_type for o in schemas["CasDMHead"][1].outputs] == ["MODEL"]


SD15 = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=(1, 2, 4, 4),
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_middle=1,
    transformer_depth_output=[1] * 9 + [0] * 3,
    context_dim=768,
    use_spatial_transformer=True,
    use_linear_in_transformer=False,
    num_heads=8,
    num_head_channels=-1,
    legacy=False,
    dtype=torch.float32,
)


@pytest.mark.slow
def test_head_costs_little_compared_to_sd15(monkeypatch):
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", comfy.ldm.modules.attention.attention_basic)
    with torch.device("meta"):
        theta = openaimodel.UNetModel(**SD15, operations=comfy.ops.disable_weight_init)
        head = CasDMHeadNet(CasDMHeadConfig(channels=4))
        with FlopCounterMode(display=False) as theta_counter:
            theta(torch.zeros(1, 4, 64, 64), torch.zeros(1), context=torch.zeros(1, 77, 768))
        with FlopCounterMode(display=False) as head_counter:
            head(torch.zeros(1, 4, 64, 64), torch.zeros(1))
    flops = [c.get_total_flops() for c in (theta_counter, head_counter)]
    assert 700e9 < flops[0] < 900e9
    assert flops[1] <= 0.05 * flops[0]
    weights = [sum(p.numel() for p in network.parameters()) for network in (theta, head)]
    assert 4 * weights[1] <= 0.02 * 2 * weights[0]  # in bytes: the head in float32, the model in float16


def test_non_finite_prediction_error_names_the_sample():
    model = MODELS["eps"]()
    rows = torch.cat([PROMPTS[0][0][0]] * 2)
    rows[1] = float("nan")
    prompts = [[rows, PROMPTS[0][0][1]]], PROMPTS[1]
    with pytest.raises(ValueError, match=r"is not finite .* in sample 2, before Cas-DM head 1"):
        sample(apply_head(model, head_for(model)), prompts)
