"""A head on a MODEL: what it does under the real samplers, what it refuses, what the host keeps of it."""

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
from chorus.techniques.cas_dm.comfy_files import find_head, head_files
from chorus.techniques.cas_dm.comfy_hook import heads_on, prediction_of
from chorus.techniques.cas_dm.mix import amplitudes, noise_level
from chorus.techniques.cas_dm.network import CasDMHeadConfig, CasDMHeadNet, Head, to_file
from chorus.tests.support.gradients import direction_of, finite_difference, gradient, run_of
from chorus.tests.support.heads import EXPERT_WORDS, MODELS, WORDS, head_for, put, sample
from chorus.tests.support.lifecycle import stop_at
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


def around(model, head, **inputs):
    """``model`` with ``head``, and what every prediction was before and after it."""
    recorded, before = recording(model)
    recorded, after = recording(put(recorded, head, **inputs))
    return recorded, before, after


def by_hand(head, call, flow, strength=1.0):
    """What ``head`` makes of a recorded call, by plain layers."""
    signal, noise = amplitudes(call.sigma, flow)
    scale = (signal**2 + noise**2).sqrt()[:, None, None, None]
    with torch.inference_mode():
        x_phi, r = head.network()(call.denoised, noise_level(signal, noise), call.x / scale)
    return call.denoised + strength * (r * x_phi + (1 - r) * call.denoised - call.denoised)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_an_untrained_head_changes_nothing(kind, cfg):
    model = MODELS[kind]()
    head = head_for(model, size=0.0, cfg=cfg)
    torch.testing.assert_close(sample(put(model, head), cfg=cfg), sample(model, cfg=cfg), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "dpmpp_2m", "uni_pc", "ddim", "heun", "euler_cfg_pp", "dpmpp_sde"]
)
def test_any_sampler(sampler):
    model = unet(0)
    plain = sample(model, sampler=sampler)
    assert torch.equal(sample(put(model, head_for(model, size=0.0)), sampler=sampler), plain)
    recorded, before, after = around(model, head := head_for(model))
    assert not torch.allclose(sample(recorded, sampler=sampler), plain, rtol=1e-2)
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a.denoised, by_hand(head, b, flow=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "config", [{}, {"condition_on_x_t": True, "gate": "channel"}, {"gate": "sample"}, {"gate": "fixed"}], ids=str
)
def test_the_sampler_is_told_the_mix(kind, config):
    model = MODELS[kind]()
    head = head_for(model, **config)
    recorded, before, after = around(model, head, strength=0.7)
    sample(recorded, size=(13, 7) if kind != "flux" else (12, 10))
    assert len(before) == 3
    # where flow models end there is next to no noise, and next to nothing to repaint
    assert not torch.allclose(after[0].denoised, before[0].denoised, rtol=1e-2, atol=1e-2)
    for b, a in zip(before, after, strict=True):
        expected = by_hand(head, b, kind in ("flow", "flux"), strength=0.7)
        torch.testing.assert_close(a.denoised, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "off",
    [dict(strength=0.0), dict(start_percent=0.4, end_percent=0.4), dict(start_percent=0.8, end_percent=0.1)],
    ids=str,
)
@pytest.mark.parametrize("kind", MODELS)
def test_switched_off_is_exact_and_loads_nothing(kind, off):
    model = MODELS[kind]()
    worn = put(model, head_for(model), **off)
    assert worn is not model and heads_on(worn) == 0
    assert torch.equal(sample(worn), sample(model))


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("window", [(0.0, 0.3), (0.3, 0.7), (0.7, 1.0)])
def test_it_acts_in_its_window_only(kind, window):
    model = MODELS[kind]()
    recorded, before, after = around(model, head_for(model), start_percent=window[0], end_percent=window[1])
    sample(recorded, steps=8, sampler="dpm_2")  # which asks twice a step, at other sigmas
    first, last = (model.get_model_object("model_sampling").percent_to_sigma(p) for p in window)
    acted = [not torch.equal(b.denoised, a.denoised) for b, a in zip(before, after, strict=True)]
    assert acted == [last < float(b.sigma[0]) <= first for b in before]
    assert 0 < sum(acted) < len(acted) > 8


def test_a_window_that_no_step_falls_into_is_exact():
    model = unet(0)
    worn = put(model, head_for(model), start_percent=0.999, end_percent=1.0)
    assert heads_on(worn) == 1
    assert torch.equal(sample(worn, denoise=1.0, scheduler="sgm_uniform"), sample(model, scheduler="sgm_uniform"))


def test_heads_act_one_after_the_other():
    model = unet(0)
    first, second = head_for(model, 1), head_for(model, 2, size=0.6)
    recorded, before, between = around(model, first)
    recorded, after = recording(put(recorded, second, strength=0.5))
    assert heads_on(recorded) == 2
    got = sample(recorded)
    for b, m, a in zip(before, between, after, strict=True):
        torch.testing.assert_close(m.denoised, by_hand(first, b, False), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.denoised, by_hand(second, m, False, 0.5), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, sample(put(put(model, second, 0.5), first)), rtol=1e-2)
    # branches of one graph do not see each other
    assert torch.equal(sample(put(put(model, first), second, 0.5)), got)
    assert heads_on(model) == 0


@pytest.mark.parametrize("expert", [lambda: unet(1), lambda: unet(1, "v")], ids=["eps", "v"])
def test_it_refines_a_blend(expert):
    base, expert = unet(0), expert()
    head = head_for(base)
    blended, trace = blend(base, expert, *EXPERT_WORDS)
    recorded, before, after = around(blended, head)
    got = sample(recorded)
    assert trace.record.spent == [3, 3]
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a.denoised, by_hand(head, b, False), rtol=1e-4, atol=1e-4)
    assert torch.equal(before[0].denoised, after_of(blended)[0].denoised)
    # a head on the base that is blended later is the blend's
    assert torch.equal(sample(blend(put(base, head), expert, *EXPERT_WORDS)[0]), got)
    assert torch.equal(sample(put(blended, head, strength=0.0)), sample(blended))


def after_of(model):
    recorded, calls = recording(model)
    sample(recorded)
    return calls


def test_one_checkpoint_blended_with_itself_still_shares_its_batches():
    base = unet(0)
    blended, _ = blend(base, base, *EXPERT_WORDS)
    with forwards(base) as rows:
        sample(blended)
        plain = list(rows)
        sample(put(blended, head_for(base, size=0.0)))
    assert rows[len(plain) :] == plain


def test_a_head_on_an_expert_is_refused():
    base, expert = unet(0), unet(1)
    with pytest.raises(ValueError, match="Cas-DM"):
        blend(base, put(expert, head_for(expert)), *EXPERT_WORDS)


def test_loras_before_and_after_are_the_models():
    model = unet(0)
    head = head_for(model)
    recorded, before, after = around(lora(model, 3), head)
    got = sample(recorded)
    assert not torch.allclose(got, sample(put(model, head)), rtol=1e-2)
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a.denoised, by_hand(head, b, False), rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(lora(put(model, head), 3)), got)


@in_inference_mode
def with_control(model, seed):
    net = controlnet(seed)
    hint = torch.rand(1, 96, 80, 3, generator=torch.Generator().manual_seed(seed)).movedim(-1, 1)
    control = net.copy().set_cond_hint(hint, 1.0, (0.0, 1.0))
    return tuple([[t, {**o, "control": control, "control_apply_to_uncond": False}] for t, o in w] for w in WORDS)


def test_controlnets():
    model = unet(0)
    words, head = with_control(model, 5), head_for(model)
    assert not torch.allclose(sample(model, words), sample(model), rtol=1e-2)
    recorded, before, after = around(model, head)
    sample(recorded, words)
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(a.denoised, by_hand(head, b, False), rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(put(model, head_for(model, size=0.0)), words), sample(model, words))


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_inpainting_keeps_what_the_mask_keeps(kind):
    model, mask = MODELS[kind](), torch.zeros(1, 12, 10)
    mask[:, :, 5:] = 1
    image = torch.randn(1, 4, 12, 10, generator=torch.Generator().manual_seed(4))
    content = {"samples": image, "noise_mask": mask}
    plain, refined = (ksample(m, *WORDS, content) for m in (model, put(model, head_for(model))))
    assert torch.equal(refined[..., :5], plain[..., :5])
    torch.testing.assert_close(refined[..., :5], image[..., :5], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(refined[..., 5:], plain[..., 5:], rtol=1e-2)


def test_video_is_refined_frame_by_frame():
    model = unet(0)
    head = head_for(model)
    worn = put(model, head)
    hook = worn.model_options["sampler_post_cfg_function"][-1]
    x0, x = torch.randn(2, 4, 3, 6, 5), torch.randn(2, 4, 3, 6, 5)
    args = dict(sigma=torch.full((2,), 1.5), model=model.model, cond_scale=5.0, model_options={})
    got = hook(dict(args, denoised=x0, input=x))
    for t in range(3):
        assert torch.equal(got[:, :, t], hook(dict(args, denoised=x0[:, :, t], input=x[:, :, t])))
    with pytest.raises(ValueError, match=r"this one is \(2, 4, 3\)"):
        hook(dict(args, denoised=x0[..., 0, 0], input=x[..., 0, 0]))


REFUSED = {
    "other latents": (
        lambda: unet(0, latent_format=comfy.latent_formats.SDXL),
        "SD15 .4 channels., this model has SDXL",
    ),
    "other channels": (lambda: flux(0), r"this model has Flux \(16 channels\); use a head of this format"),
    "v": (lambda: unet(0, "v"), "trained on a model that predicts eps, this one predicts v"),
    "flow": (lambda: unet(0, "flow"), "predicts eps, this one predicts flow"),
    "image to image": (lambda: unet(0, "img_to_img"), "no Cas-DM head can refine it"),
}


@pytest.mark.parametrize("model", REFUSED)
@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_what_it_was_not_made_for_is_refused(model, strength):
    make, message = REFUSED[model]
    with pytest.raises(ValueError, match=message):
        put(make(), head_for(unet(0)), strength)


@in_inference_mode
def sampled_as(model, kind):
    return comfy_extras.nodes_model_advanced.ModelSamplingDiscrete().patch(model, kind, False)[0]


def test_the_sampling_nodes_count():
    model = unet(0)
    head = head_for(model)
    with pytest.raises(ValueError, match="predicts eps, this one predicts v"):
        put(sampled_as(model, "v_prediction"), head)
    with pytest.raises(ValueError, match="predicts eps, this one predicts v"):
        sample(sampled_as(put(model, head), "v_prediction"))
    assert prediction_of(sampled_as(model, "x0").get_model_object("model_sampling")) == "x0"


def test_another_guidance_scale_is_warned_of_once(caplog):
    model = unet(0)
    worn = put(model, head_for(model, cfg=5.0))
    with caplog.at_level(logging.WARNING):
        sample(worn)
        assert "CasDMHead" not in caplog.text
        sample(worn, cfg=7.5)
        sample(worn, cfg=7.5)
    assert caplog.text.count("trained on predictions at cfg 5, this run guides at 7.5") == 1


def loaded():
    return [m.model.model for m in comfy.model_management.current_loaded_models]


def test_the_host_loads_and_unloads_it_with_the_model():
    model = unet(0)
    worn = put(model, head_for(model))
    (patcher,) = worn.get_additional_models_with_key("chorus_cas_dm_0")
    seen = []
    worn.set_model_sampler_post_cfg_function(lambda args: seen.append(loaded()) or args["denoised"])
    sample(worn)
    assert all(any(m is patcher.model for m in now) and any(m is model.model for m in now) for now in seen)
    assert any(m is patcher.model for m in loaded())
    comfy.model_management.unload_model_and_clones(worn)
    assert not any(m is patcher.model or m is model.model for m in loaded())


def test_it_is_gone_with_the_model_that_wears_it():
    model = unet(0)
    worn = put(model, head_for(model))
    network = weakref.ref(worn.get_additional_models_with_key("chorus_cas_dm_0")[0].model)
    sample(worn)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(stop_at(worn, 2))
    assert set(model.model_options) == {"transformer_options"} and not model.additional_models
    del worn
    comfy.model_management.cleanup_models()
    gc.collect()
    assert network() is None
    assert torch.equal(sample(model), sample(unet(0)))


def test_it_works_from_where_the_host_left_it():
    model = unet(0)
    worn = put(model, head_for(model))
    expected = sample(worn)
    (patcher,) = worn.get_additional_models_with_key("chorus_cas_dm_0")
    patcher.detach()
    patcher.load(torch.device("cpu"), lowvram_model_memory=1)
    assert patcher.model.model_lowvram
    assert torch.equal(sample(worn), expected)


def test_copies_for_further_devices_have_weights_of_their_own():
    worn = put(unet(0), head_for(unet(0)))
    (patcher,) = worn.get_additional_models_with_key("chorus_cas_dm_0")
    with torch.inference_mode():
        twin = patcher.deepclone_multigpu()
    for ours, theirs in zip(patcher.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr() and not theirs.is_inference()


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_gradient_of_a_seed_passes_through_it(kind):
    model = MODELS[kind]()
    worn = put(model, head_for(model, condition_on_x_t=True))
    run = run_of(worn)
    loss, found = gradient(run)
    direction = direction_of(found)
    slope = finite_difference(run, direction)
    assert float((found * direction).sum()) == pytest.approx(slope, rel=2e-3)
    plain, without = gradient(run_of(model))
    assert not torch.allclose(found, without, rtol=1e-1) and loss != plain


@in_inference_mode
def test_the_gradient_of_a_seed_passes_through_weights_of_inference_mode():
    """As a head would be that another pack made in its node."""
    model = unet(0)
    worn = put(model, head_for(model))
    (patcher,) = worn.get_additional_models_with_key("chorus_cas_dm_0")
    expected = gradient(run_of(worn))[1]
    for module in patcher.model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(p.clone(), requires_grad=False)
    assert all(p.is_inference() for p in patcher.model.parameters())
    torch.testing.assert_close(gradient(run_of(worn))[1], expected)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """models/cas_dm, the input and the output folder, empty."""
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


def test_what_is_loaded_is_what_was_saved(folders):
    model = unet(0)
    head = head_for(model)
    save(head)
    (name,) = head_files()
    assert name == "cas_dm/head_00001_.cas_dm.safetensors [output]"
    assert cas_dm.LoadCasDMHead.validate_inputs(name) is True
    read = load(name)
    assert read.config == head.config and read.facts == head.facts
    assert not any(w.is_inference() for w in read.weights.values())
    torch.testing.assert_close(sample(put(model, read)), sample(put(model, head)), rtol=5e-2, atol=5e-2)
    # what a user copies into the model folder, under any name
    find_head(name).rename(folders / "cas_dm" / "mine.safetensors")
    assert head_files() == ["mine.safetensors"]
    assert torch.equal(sample(put(model, load("mine.safetensors"))), sample(put(model, read)))


def test_no_file_is_overwritten(folders):
    heads = [head_for(unet(0), seed) for seed in (1, 2)]
    for head in heads:
        save(head)
    first, second = head_files()
    for name, head in zip((first, second), heads, strict=True):
        assert torch.equal(load(name).weights["last.weight"], head.weights["last.weight"].half())
    prints = {cas_dm.LoadCasDMHead.fingerprint_inputs(name) for name in (first, second)}
    assert len(prints) == 2


def test_a_full_disk_leaves_nothing(folders, full_disk):
    with pytest.raises(OSError, match="No space left"):
        save(head_for(unet(0)))
    assert [p for p in (folders / "output").rglob("*") if p.is_file()] == []


def test_a_head_whose_training_failed_is_not_saved(folders):
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
    "pickle": (lambda: pickle.dumps({"last.weight": 1}, protocol=4), "it is a pickle under another name"),
    "zipped pickle": (lambda: b"PK\x03\x04" + bytes(100), "it is a pickle under another name"),
    "git's pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "cut off": (lambda: safetensors.torch.save(changed()[0])[:-10], "damaged or not whole"),
    "empty": (lambda: b"", "it is empty"),
    "another network": (lambda: ({"a": torch.zeros(1)}, {"format": "pt"}), "it is no Cas-DM head"),
    "no metadata": (lambda: ({"a": torch.zeros(1)}, None), "it is no Cas-DM head"),
    "of a newer version": (lambda: changed(format="chorus-cas-dm-2"), "not 'chorus-cas-dm-1'"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_no_head_is_refused_by_name(folders, damage):
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
def test_files_that_are_not_there(folders, name):
    (folders / "secret.safetensors").write_bytes(b"")
    (folders / "x.cas_dm.safetensors").write_bytes(b"")
    message = cas_dm.LoadCasDMHead.validate_inputs(name)
    assert isinstance(message, str) and name in message
    with pytest.raises(ValueError):
        load(name)
    assert cas_dm.LoadCasDMHead.validate_inputs(None) is True


def test_the_model_folder_is_registered():
    paths, endings = folder_paths.folder_names_and_paths["cas_dm"]
    assert str(Path(folder_paths.models_dir) / "cas_dm") in paths and endings == {".safetensors"}
    assert comfy_files.FOLDER == "cas_dm" and comfy_hook.KEY.startswith("chorus")


INPUTS = {
    "LoadCasDMHead": ["file"],
    "SaveCasDMHead": ["head", "filename_prefix"],
    "CasDMHead": ["model", "head", "strength", "start_percent", "end_percent"],
}


def test_nodes_are_those_of_the_design():
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


def test_it_costs_little_beside_sd15(monkeypatch):
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", comfy.ldm.modules.attention.attention_basic)
    with torch.device("meta"):
        theta = openaimodel.UNetModel(**SD15, operations=comfy.ops.disable_weight_init)
        head = CasDMHeadNet(CasDMHeadConfig(channels=4))
        with FlopCounterMode(display=False) as of_theta:
            theta(torch.zeros(1, 4, 64, 64), torch.zeros(1), context=torch.zeros(1, 77, 768))
        with FlopCounterMode(display=False) as of_head:
            head(torch.zeros(1, 4, 64, 64), torch.zeros(1))
    flops = [c.get_total_flops() for c in (of_theta, of_head)]
    assert 700e9 < flops[0] < 900e9
    assert flops[1] <= 0.05 * flops[0]
    weights = [sum(p.numel() for p in network.parameters()) for network in (theta, head)]
    assert 4 * weights[1] <= 0.02 * 2 * weights[0]  # float32 beside float16
