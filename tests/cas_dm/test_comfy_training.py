"""Tests of training a head through its node, on tiny random models, with the demo's VAE and image encoder."""

import inspect
import logging
import math

import comfy.latent_formats
import comfy.model_management
import comfy.nested_tensor
import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras.nodes_train import LossGraphNode

from chorus.demo import modules
from chorus.host import training_metrics
from chorus.host.training_images import TrainingImages, training_gradients
from chorus.host.training_run import training_device_and_dtype
from chorus.nodes import cas_dm, cas_dm_train
from chorus.nodes.cas_dm_train import TrainCasDMHead
from chorus.techniques.cas_dm import comfy_train_node
from chorus.techniques.cas_dm.comfy_files import FILES, read_head
from chorus.techniques.cas_dm.comfy_training import GuidedPrediction, process_of, read_latents
from chorus.techniques.cas_dm.training import CasDMTraining
from chorus.techniques.cas_dm.training_data import Process
from chorus.tests.support.blend_definition import TIE, definition
from chorus.tests.support.gradients import tiny_encoder
from chorus.tests.support.head_training import QUICK, Scaled, latents, train
from chorus.tests.support.heads import MODELS, PROMPTS, apply_head, head_for, sample
from chorus.tests.support.lifecycle import interrupt_at
from chorus.tests.support.tiers import covering
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    defaults,
    forwards,
    in_inference_mode,
    lora,
    predictions,
    recording,
    unet,
)
from chorus.training.loop import TrainingLoop
from chorus.training.metrics import join_features, l1

pytestmark = pytest.mark.usefixtures("one_thread", "folders")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders that replace models/cas_dm, input, output and temp."""
    for kind in ("input", "output", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "cas_dm", ([str(tmp_path / "cas_dm")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return modules.make_vae(modules.load_autoencoder())


def same(a, b):
    return all(torch.equal(a.weights[name], w) for name, w in b.weights.items())


# region and bias give each model one half of the image: their scores differ so much that rounding cannot change the
# hard mask
HALVES, BIAS = torch.tensor([1.0, math.exp(-8)]).repeat_interleave(5).expand(1, 12, 10), 4.0
EXPERT_PROMPTS = conditioning(30), conditioning(31)


def half_blend():
    return blend(unet(0), unet(1), *EXPERT_PROMPTS, start_percent=0.3, region=HALVES.clone(), bias=BIAS)[0]


GUIDED = {
    **MODELS,
    "lora": lambda: lora(unet(0), 3),
    "blend": half_blend,
    "head": lambda: apply_head(unet(0), head_for(unet(0)), 1.0, 0.3, 1.0),
}


@covering(cfg=[5.0, 1.0], kind=[*GUIDED])
def test_prediction_is_the_guided_x0_of_the_sampler(kind, cfg):
    model = GUIDED[kind]()
    recorded, calls = recording(model)
    sample(recorded, cfg=cfg)
    if kind == "blend":
        own_predictions = [predictions(m, *w, calls) for m, w in ((unet(0), PROMPTS), (unet(1), EXPERT_PROMPTS))]
        extra = np.stack([np.zeros((1, 12, 10)), BIAS + HALVES.log().numpy()])
        for call, *own in zip(calls, *own_predictions, strict=True):
            pairs = [(a.cond, a.uncond) for a in own]
            expected = definition(call, pairs, strengths=(1.0, 1.0), guidance=(cfg, cfg), extra=extra)
            assert expected.gap > 100 * TIE and 0 < expected.weights[1].mean() < 1
    guided = GuidedPrediction(model, PROMPTS[0], PROMPTS[1], cfg, 2)
    for call in calls:
        actual = guided(call.x.clone(), call.sigma.clone(), [0, 1])
        assert not actual.is_inference() and not actual.requires_grad
        torch.testing.assert_close(actual, call.denoised.clone(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["eps", "flow", "blend", "head"])
def test_each_image_is_predicted_with_its_prompt_and_noise_level(kind):
    model, prompts = GUIDED[kind](), [conditioning(seed)[0] for seed in (10, 20, 30)]
    guided = GuidedPrediction(model, prompts, PROMPTS[1], 4.0, 3)
    assert guided.one_by_one == (kind in ("blend", "head"))
    x, sigma = torch.randn(4, 4, 8, 6), torch.tensor([0.9, 0.3, 0.6, 0.1])
    with forwards(model) as rows:
        together = guided(x, sigma, [2, 0, 1, 2])
    assert sum(rows) == 8 and len(rows) == (4 if guided.one_by_one else 1)
    for row, index in enumerate([2, 0, 1, 2]):
        alone = GuidedPrediction(model, [prompts[index]], PROMPTS[1], 4.0, 1)(
            x[row : row + 1], sigma[row : row + 1], [0]
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    others = GuidedPrediction(model, prompts[::-1], PROMPTS[1], 4.0, 3)(x, sigma, [2, 0, 1, 2])
    assert not torch.allclose(others[0], together[0], rtol=1e-2)


def test_prompts_of_different_lengths_are_not_batched():
    model, prompts = unet(0), [conditioning(10)[0], conditioning(20, tokens=7)[0]]
    guided = GuidedPrediction(model, prompts, PROMPTS[1], 1.0, 2)
    x, sigma = torch.randn(4, 4, 8, 6), torch.full((4,), 0.7)
    with forwards(model) as rows:
        together = guided(x, sigma, [0, 1, 0, 1])
    assert rows == [2, 2]
    for row in range(4):
        alone = GuidedPrediction(model, [prompts[row % 2]], None, 1.0, 1)(x[row : row + 1], sigma[row : row + 1], [0])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_noise_matches_comfyui(kind):
    model = MODELS[kind]()
    process, sampling = Process(*process_of(model)), model.get_model_object("model_sampling")
    x0, noise = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    sigma = process.sigmas(torch.tensor([0.1, 0.5, 0.9]))
    assert sigma.tolist() == [pytest.approx(float(sampling.percent_to_sigma(p)), rel=1e-5) for p in (0.1, 0.5, 0.9)]
    expected = sampling.noise_scaling(sigma, noise.clone(), x0, False)
    torch.testing.assert_close(process.noisy(x0, noise, sigma), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_training_improves_and_leaves_the_model_unchanged(kind):
    model = MODELS[kind]()
    before, options = sample(model), repr(model.model_options)
    result = train(model, steps=40, batch_size=4)
    head, facts = result.head, result.head.facts
    assert len(result.loss_map["loss"]) == 40
    assert "it improved" in result.report and "no lower MSE" not in result.report
    assert (facts.latent_format, facts.prediction, facts.cfg) == ("SD15", kind, 5.0)
    assert facts.steps == 40 and facts.data == "4 latents" and len(facts.gate) == 8
    assert facts.details["metric"] == "none" and float(facts.details["held_out_loss"]) > 0
    assert not any(w.is_inference() or w.requires_grad for w in head.weights.values())
    assert torch.equal(sample(model), before) and repr(model.model_options) == options
    assert all(p.grad is None for p in model.model.parameters())
    patched = sample(apply_head(model, head))
    assert patched.isfinite().all() and not torch.allclose(patched, before, rtol=1e-2)
    assert not comfy.model_management.in_training
    with torch.inference_mode():
        LossGraphNode.execute(result.loss_map, "loss")


@pytest.mark.slow
def test_saved_head_resumes():
    model = unet(0)
    first = train(model).head
    comfy_train_node.save_head(*comfy_train_node.to_file(first), "cas_dm/head")
    (name,) = FILES.names()
    with torch.inference_mode():
        read = read_head(name)
    second = train(model, head=read, steps=4, size="large")
    assert second.head.facts.steps == 10 and second.head.config == first.config
    assert "resumed at step 6" in second.report and not same(second.head, first)


@pytest.mark.slow
def test_latents_of_several_sizes_with_one_prompt_each():
    model = unet(0)
    samples = [latents(2), latents(1, size=(6, 10), seed=1), latents(3, seed=2)]
    prompts = [[conditioning(seed)[0]] for seed in range(40, 46)]
    result = train(model, samples, prompts)
    assert "6 latents of 2 size(s)" in result.report
    # one conditioning with all prompts, as from Conditioning (Combine)
    assert same(train(model, samples, [p for prompt in prompts for p in prompt]).head, result.head)
    assert not same(train(model, samples, prompts[::-1]).head, result.head)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("metric", ["clip_vision", "l1", "huber"])
def test_metrics_on_images_are_trained_and_reported(vae, metric, checkpointing):
    model = unet(0, latent_format=Scaled)
    samples = latents(channels=8, size=(8, 6))
    result = train(model, samples, metric=metric, vae=vae, clip_vision=tiny_encoder(), crop=24, metric_weight=2.0,
                   gradient_checkpointing=checkpointing)  # fmt: skip
    assert len(result.loss_map["metric"]) == 6 and all(v > 0 for v in result.loss_map["metric"])
    assert f"{metric}: model" in result.report
    assert result.head.facts.details["metric"] == metric
    plain = train(model, samples, metric=metric, vae=vae, clip_vision=tiny_encoder(), metric_weight=0.0)
    assert "metric" not in plain.loss_map and not same(plain.head, result.head)


@pytest.mark.slow
def test_l1_needs_no_vae():
    result = train(unet(0), metric="l1")
    assert len(result.loss_map["metric"]) == 6


@pytest.mark.parametrize("encoder", ["clip", "siglip", "demo"])
def test_features_and_images_match_comfyui(vae, encoder):
    make = {"siglip": lambda: tiny_encoder("siglip_vision_model"), "demo": modules.load_vision}.get(
        encoder, tiny_encoder
    )
    model = unet(0, latent_format=Scaled)
    with torch.inference_mode():
        encoder = make()
        z = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
        expected = vae.decode(model.model.process_latent_out(z)).clone()
        encoder.return_all_hidden_states = True
        outputs = [encoder.encode_image(p) for p in expected.split(1)]
        encoder.return_all_hidden_states = False
    layers = torch.cat([o["all_hidden_states"] for o in outputs]).clone()
    embeds = torch.cat([o["image_embeds"] for o in outputs]).clone()
    gradients = []
    for checkpoint in (True, False):
        with training_gradients():
            seen = TrainingImages(model, vae, encoder, checkpoint)
            with seen.recording():
                x = z.clone().requires_grad_(True)
                images = seen.decode(x)
                features = seen.features(images, join_features)
                (features[:, ::3].sum() + images.square().mean()).backward()
        torch.testing.assert_close(images.detach(), expected)
        expected_features = join_features([*layers.unbind(1), embeds.mean(1) if embeds.ndim == 3 else embeds])
        torch.testing.assert_close(features.detach(), expected_features, rtol=1e-3, atol=1e-5)
        gradients.append(x.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_full_cache_trains_the_same_head_and_unloads_the_model(monkeypatch):
    model, unloaded = unet(0), []
    monkeypatch.setattr(GuidedPrediction, "unload", lambda self: unloaded.append(self.model))
    plain = train(model, gradient_accumulation=2)
    assert unloaded == []
    cached = train(model, gradient_accumulation=2, cached_steps=50)
    assert same(plain.head, cached.head) and plain.loss_map == cached.loss_map and unloaded == [model]
    assert not same(train(model, gradient_accumulation=2, cached_steps=2).head, plain.head)


def test_unload_frees_the_model():
    model = unet(0)
    guided = GuidedPrediction(model, *PROMPTS, 5.0, 1)
    guided(torch.randn(1, 4, 8, 8), torch.ones(1), [0])
    loaded = lambda: any(m.model.model is model.model for m in comfy.model_management.current_loaded_models)  # noqa: E731
    assert loaded()
    guided.unload()
    assert not loaded()


@pytest.mark.slow
def test_interrupt_saves_a_checkpoint(caplog):
    samples, first_calls = latents(3), 3 * 8  # 3 validation images at 8 levels, before the first step
    stopped = interrupt_at(unet(0), first_calls + 3 * 2 + 1)
    with caplog.at_level(logging.WARNING), pytest.raises(comfy.model_management.InterruptProcessingException):
        train(stopped, samples, validation_fraction=0.0)
    (name,) = FILES.names()
    assert name.startswith("cas_dm/head_interrupted_step3_") and "the weights trained so far are in" in caplog.text
    assert read_head(name).facts.steps == 3
    assert not comfy.model_management.in_training
    # before the first step there is nothing to save
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(interrupt_at(unet(0), 2), samples)
    assert FILES.names() == [name]


def test_non_finite_loss_ends_training_and_names_the_checkpoint(monkeypatch):
    calls = []  # 16 batches with 4 calls each before the first step, then one call per step

    def spoil(a, b):
        calls.append(1)
        actual = l1(a, b)
        return actual * torch.nan if len(calls) == 69 else actual

    monkeypatch.setitem(training_metrics.ELEMENTWISE, "l1", spoil)
    with pytest.raises(
        ValueError, match=r"NaN or infinite.*lower the learning rate.*trained so far are in .*_failed_step"
    ):
        train(unet(0), metric="l1", steps=100)
    (name,) = FILES.names()
    assert all(w.isfinite().all() for w in read_head(name).weights.values())


@pytest.mark.slow
def test_checkpoints_are_saved_every_n_steps():
    result = train(unet(0), steps=5, checkpoint_every=2, checkpoint_prefix="mine/x")
    names = FILES.names()
    assert names == [f"mine/x_step{n}_00001_.cas_dm.safetensors [output]" for n in (2, 4)]
    assert [read_head(name).facts.steps for name in names] == [2, 4]
    assert result.head.facts.steps == 5


@pytest.fixture
def overfits_after(monkeypatch):
    """Function that makes the head worse in every step after the first ``done`` steps."""

    def start(done):
        follow = TrainingLoop.update_average

        def spoil(self):
            if self.done > done:
                with torch.no_grad():
                    self.parameters[-1].add_(1.0)
            follow(self)

        monkeypatch.setattr(TrainingLoop, "update_average", spoil)

    return start


@pytest.mark.slow
def test_returns_best_checkpoint(overfits_after):
    plain = train(unet(0), steps=4, ema_decay=0.0)
    overfits_after(4)
    result = train(unet(0), steps=8, ema_decay=0.0, preview_every=4)
    assert same(result.head, plain.head) and result.head.facts.steps == 4
    assert result.head.facts.details["held_out_loss"] == plain.head.facts.details["held_out_loss"]
    assert len(result.loss_map["loss"]) == 8
    assert "8 steps of" in result.report and "the loss was lowest after 4 steps of this run" in result.report
    # without an evaluation during the run, the last weights are returned
    assert train(unet(0), steps=8, ema_decay=0.0).head.facts.steps == 8


@pytest.mark.slow
def test_checkpoints_hold_their_validation_loss(overfits_after):
    overfits_after(2)
    result = train(unet(0), steps=6, ema_decay=0.0, checkpoint_every=2)
    losses = [float(read_head(name).facts.details["held_out_loss"]) for name in FILES.names()]
    assert len(losses) == 2 and losses[1] > losses[0]
    assert result.head.facts.steps == 2 and float(result.head.facts.details["held_out_loss"]) == losses[0]


@pytest.mark.slow
def test_interrupt_saves_the_best_checkpoint(overfits_after):
    # wrapped like the model below, but this run ends before its interrupt at call 1000
    plain = train(interrupt_at(unet(0), 1000), latents(3), steps=2, ema_decay=0.0, validation_fraction=0.0)
    overfits_after(2)
    first_calls = 3 * 8  # 3 validation images at 8 levels, before the first step
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stopped = interrupt_at(unet(0), first_calls + 4 * 2 + 1)
        train(stopped, latents(3), steps=9, ema_decay=0.0, validation_fraction=0.0, preview_every=2)
    (name,) = FILES.names()
    assert name.startswith("cas_dm/head_interrupted_step2_")
    saved = read_head(name)
    for key, weight in plain.head.weights.items():
        assert torch.equal(saved.weights[key], weight.half())


@pytest.mark.slow
def test_interrupt_saves_the_last_weights_if_evaluation_fails(monkeypatch, caplog):
    restored = []

    def raise_out_of_memory(self):
        restored.append(1)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(TrainingLoop, "restore_best", raise_out_of_memory)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(interrupt_at(unet(0), 3 * 8 + 3 * 2 + 1), latents(3), steps=9, validation_fraction=0.0, preview_every=2)
    (name,) = FILES.names()
    assert restored == [1] and "_interrupted_step3_" in name and "could not be evaluated; they are saved" in caplog.text


def files(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_full_disk_does_not_end_training(folders, full_disk, caplog):
    result = train(unet(0), steps=5, checkpoint_every=2)
    assert result.head.facts.steps == 5 and same(result.head, train(unet(0), steps=5).head)
    for done in (2, 4):
        assert f"NOT written: the checkpoint after {done} steps: [Errno 28] No space left on device" in result.report
    assert str(folders) not in result.report and str(folders) in caplog.text  # reports are saved and shared
    assert caplog.text.count("a checkpoint could not be written; training continues") == 2
    assert files(folders / "output") == []
    with torch.inference_mode(), pytest.raises(OSError, match="No space left on device"):
        cas_dm.SaveCasDMHead.execute(result.head, "cas_dm/head")
    assert files(folders / "output") == []


def test_interrupt_on_a_full_disk_still_interrupts(folders, full_disk, caplog):
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(interrupt_at(unet(0), 3 * 8 + 3 * 2 + 1), latents(3), validation_fraction=0.0)
    assert "the trained weights could not be saved" in caplog.text and "No space left on device" in caplog.text
    assert files(folders / "output") == []


def test_bfloat16_only_on_devices_that_support_it(monkeypatch):
    model = unet(0)
    assert training_device_and_dtype(model) == (torch.device("cpu"), torch.float32)
    model.load_device = torch.device("meta")  # in place of a GPU
    for has in (True, False):
        monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda device, has=has: has)
        assert training_device_and_dtype(model) == (model.load_device, torch.bfloat16 if has else torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("with_vae", [True, False])
def test_validation_images_are_shown(vae, with_vae, monkeypatch):
    sheets = []
    draw = comfy_train_node.draw_examples
    monkeypatch.setattr(
        comfy_train_node, "draw_examples", lambda rows: sheets.append((rows, draw(rows))) or sheets[-1][1]
    )
    model = unet(0, latent_format=Scaled) if with_vae else unet(0)
    result = train(model, steps=4, preview_every=2, **({"vae": vae} if with_vae else {}))
    assert len(result.ui.as_dict()["images"]) == 1
    assert len(sheets) == 3  # twice during the run, once at the end
    rows, sheet = sheets[-1]
    assert sheet.ndim == 3 and sheet.shape[-1] == 3 and 0 <= sheet.min() < sheet.max() <= 1
    assert len(rows) == 4 and all(len(images) == 4 for _, _, images in rows)
    assert rows[0][2][0].shape == ((64, 64, 3) if with_vae else (8, 8, 3))


@in_inference_mode
def nested():
    return {"samples": comfy.nested_tensor.NestedTensor([torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8)])}


INVALID = {
    "no latents": (dict(samples={"samples": torch.zeros(0, 4, 8, 8)}), "samples is empty, its size is 0x4x8x8"),
    "an empty list": (dict(samples=[]), "samples hold no latents; load images and encode them"),
    "other channels": (dict(samples=latents(channels=16)), "expected latents with 4 channels and 4 axes for .*, got 4x16x8x8"),
    "nested latents": (lambda: dict(samples=nested()), "nested latent"),
    "NaN": (lambda: dict(samples={"samples": torch.full((1, 4, 8, 8), torch.nan)}), r"not finite \(NaN or infinite\); encode"),
    "head of other channels": (
        lambda: dict(head=head_for(MODELS["flux"]())),
        r"trained on Flux latents \(16 channels\), this model has SD15 \(4 channels\)",
    ),
    "head for v prediction": (lambda: dict(head=head_for(unet(0, "v"))), "predicts v, but this model predicts eps"),
    "head for another cfg": (lambda: dict(head=head_for(unet(0), cfg=2.0)), "trained at cfg 2, but cfg is 5"),
    "no vae": (dict(metric="clip_vision"), "the metric clip_vision compares images; connect vae and clip_vision, or"),
    "lpips without a vae": (dict(metric="lpips alex"), "compares images; connect vae, or"),
    "no negative": (dict(negative=None), "cfg 5 needs a negative prompt"),
    "number of prompts": (dict(positive=PROMPTS[0] * 3), "3 prompts in positive for 4 latents"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_invalid_inputs_rejected(case):
    inputs, message = INVALID[case]
    inputs = inputs() if callable(inputs) else dict(inputs)
    with pytest.raises(ValueError, match=message):
        train(unet(0), **inputs)
    assert FILES.names() == []


@in_inference_mode
def test_list_for_single_input_rejected():
    widgets = {k: [v] for k, v in {**defaults(TrainCasDMHead), **QUICK}.items()}
    with pytest.raises(ValueError, match="negative holds a list of 2; connect a single one"):
        TrainCasDMHead.execute(
            **widgets, model=[unet(0)], samples=[latents()], positive=[PROMPTS[0]], negative=[PROMPTS[1]] * 2
        )


def test_metric_without_encoder_rejected(vae):
    with pytest.raises(ValueError, match="the metric clip_vision compares images; connect clip_vision, or"):
        train(unet(0, latent_format=Scaled), metric="clip_vision", vae=vae)


def test_blend_without_negative_rejected():
    blended = blend(unet(0), unet(1))[0]
    with pytest.raises(ValueError, match="the blend on the model needs a negative prompt"):
        train(blended, negative=None, cfg=1.0)


def test_latents_are_read_in_the_models_scale():
    model = unet(0, latent_format=comfy.latent_formats.SDXL)
    (first, *_) = read_latents(model, [latents()])
    torch.testing.assert_close(first, model.model.process_latent_in(latents()["samples"])[0].clone())
    assert not first.is_inference()


INPUTS = (
    "model samples positive negative cfg vae clip_vision head metric metric_weight steps batch_size learning_rate seed"
    " gradient_accumulation size gate condition_on_x_t gate_weights ema_decay crop validation_fraction cached_steps checkpoint_every checkpoint_prefix"
    " preview_every gradient_checkpointing"
).split()


def test_node_schema_matches_the_design():
    (node,) = cas_dm_train.NODES
    schema = node.define_schema()
    assert (schema.node_id, schema.category, schema.is_input_list) == ("TrainCasDMHead", "chorus/train", True)
    assert [i.id for i in schema.inputs] == INPUTS
    assert set(inspect.signature(node.execute).parameters) - {"inputs"} <= set(INPUTS)
    assert CasDMTraining.__dataclass_fields__.keys() <= set(INPUTS)  # every setting of the training has its widget
    assert [o.io_type for o in schema.outputs] == ["CAS_DM_HEAD", "LOSS_MAP", "STRING"]
    assert {i.id for i in schema.inputs if i.optional} == {"negative", "vae", "clip_vision", "head"}
    assert all(i.tooltip for i in schema.inputs) and schema.description
    assert all(i.advanced for i in schema.inputs[INPUTS.index("gradient_accumulation") :])
