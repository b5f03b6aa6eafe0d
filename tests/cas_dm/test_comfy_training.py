"""Training a head through its node, on tiny random models, with the demo's VAE and image encoder."""

import inspect
import logging
import math
from collections import namedtuple

import comfy.latent_formats
import comfy.model_management
import comfy.nested_tensor
import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras.nodes_train import LossGraphNode

from chorus.demo import modules
from chorus.demo.latent import ChorusDemoLatent
from chorus.host import training_metrics
from chorus.host.training_images import TrainingPictures, training_gradients
from chorus.host.training_run import training_place
from chorus.nodes import cas_dm, cas_dm_train
from chorus.nodes.cas_dm_train import TrainCasDMHead
from chorus.techniques.cas_dm import comfy_train_node
from chorus.techniques.cas_dm.comfy_files import head_files, read_head
from chorus.techniques.cas_dm.comfy_training import Guided, process_of, read_latents
from chorus.techniques.cas_dm.training_data import Process
from chorus.tests.support.blend_definition import definition
from chorus.tests.support.gradients import tiny_encoder
from chorus.tests.support.heads import MODELS, WORDS, channels_of, head_for, put, sample
from chorus.tests.support.lifecycle import stop_at
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
Result = namedtuple("Result", "head loss_map report ui")
QUICK = dict(steps=6, batch_size=2, learning_rate=3e-3, metric="none", size="small", ema_decay=0.5, seed=3)


class Scaled(ChorusDemoLatent):
    """The VAE's latents are not in the model's scale, as of real models."""

    scale_factor = 0.5


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders in place of models/cas_dm, input, output and temp."""
    for kind in ("input", "output", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "cas_dm", ([str(tmp_path / "cas_dm")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return modules.make_vae(modules.load_vae_module())


@in_inference_mode
def latents(count=4, channels=4, size=(8, 8), seed=0):
    """A LATENT of smooth pictures."""
    coarse = torch.randn(count, channels, 3, 3, generator=torch.Generator().manual_seed(seed))
    return {"samples": torch.nn.functional.interpolate(coarse, size, mode="bilinear")}


@in_inference_mode
def train(model, samples=None, positive=WORDS[0], negative=WORDS[1], **inputs) -> Result:
    """The node as ComfyUI calls it: every input is a list. ``samples`` and ``positive`` may be lists of their kind."""
    samples = latents(channels=channels_of(model)) if samples is None else samples
    widgets = {k: [v] for k, v in ({**defaults(TrainCasDMHead), "cfg": 5.0, **QUICK, **inputs}).items()}
    wired = {
        "model": [model],
        "samples": samples if isinstance(samples, list) else [samples],
        "positive": positive if isinstance(positive[0][0], list) else [positive],
        **({} if negative is None else {"negative": [negative]}),
    }
    out = TrainCasDMHead.execute(**{**widgets, **wired})
    return Result(*out.args, out.ui)


def same(a, b):
    return all(torch.equal(a.weights[name], w) for name, w in b.weights.items())


# holds the scores of a blend's two models apart, so that no rounding changes its hard mask: each generates one half
HALVES, BIAS = torch.tensor([1.0, math.exp(-8)]).repeat_interleave(5).expand(1, 12, 10), 4.0
EXPERT_WORDS = conditioning(30), conditioning(31)


def halves():
    return blend(unet(0), unet(1), *EXPERT_WORDS, start_percent=0.3, region=HALVES.clone(), bias=BIAS)[0]


GUIDED = {
    **MODELS,
    "lora": lambda: lora(unet(0), 3),
    "blend": halves,
    "head": lambda: put(unet(0), head_for(unet(0)), 1.0, 0.3, 1.0),
}


@pytest.mark.parametrize("kind", GUIDED)
@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_it_is_asked_what_the_sampler_is_told(kind, cfg):
    model = GUIDED[kind]()
    recorded, calls = recording(model)
    sample(recorded, cfg=cfg)
    if kind == "blend":
        answers = [predictions(m, *w, calls) for m, w in ((unet(0), WORDS), (unet(1), EXPERT_WORDS))]
        extra = np.stack([np.zeros((1, 12, 10)), BIAS + HALVES.log().numpy()])
        for call, *own in zip(calls, *answers, strict=True):
            pairs = [(a.cond, a.uncond) for a in own]
            expected = definition(call, pairs, strengths=(1.0, 1.0), guidance=(cfg, cfg), extra=extra)
            assert expected.gap > 0.1 and 0 < expected.weights[1].mean() < 1
    asked = Guided(model, WORDS[0], WORDS[1], cfg, 2)
    for call in calls:
        found = asked(call.x.clone(), call.sigma.clone(), [0, 1])
        assert not found.is_inference() and not found.requires_grad
        torch.testing.assert_close(found, call.denoised.clone(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["eps", "flow", "blend", "head"])
def test_every_picture_has_its_own_prompt_and_level(kind):
    model, prompts = GUIDED[kind](), [conditioning(seed)[0] for seed in (10, 20, 30)]
    asked = Guided(model, prompts, WORDS[1], 4.0, 3)
    assert asked.one_by_one == (kind in ("blend", "head"))
    x, sigma = torch.randn(4, 4, 8, 6), torch.tensor([0.9, 0.3, 0.6, 0.1])
    with forwards(model) as rows:
        together = asked(x, sigma, [2, 0, 1, 2])
    assert sum(rows) == 8 and len(rows) == (4 if asked.one_by_one else 1)
    for row, index in enumerate([2, 0, 1, 2]):
        alone = Guided(model, [prompts[index]], WORDS[1], 4.0, 1)(x[row : row + 1], sigma[row : row + 1], [0])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    others = Guided(model, prompts[::-1], WORDS[1], 4.0, 3)(x, sigma, [2, 0, 1, 2])
    assert not torch.allclose(others[0], together[0], rtol=1e-2)


def test_prompts_of_other_lengths_are_asked_apart():
    model, prompts = unet(0), [conditioning(10)[0], conditioning(20, tokens=7)[0]]
    asked = Guided(model, prompts, WORDS[1], 1.0, 2)
    x, sigma = torch.randn(4, 4, 8, 6), torch.full((4,), 0.7)
    with forwards(model) as rows:
        together = asked(x, sigma, [0, 1, 0, 1])
    assert rows == [2, 2]
    for row in range(4):
        alone = Guided(model, [prompts[row % 2]], None, 1.0, 1)(x[row : row + 1], sigma[row : row + 1], [0])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_noise_is_added_as_the_host_does(kind):
    model = MODELS[kind]()
    process, sampling = Process(*process_of(model)), model.get_model_object("model_sampling")
    x0, noise = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    sigma = process.sigmas(torch.tensor([0.1, 0.5, 0.9]))
    assert sigma.tolist() == [pytest.approx(float(sampling.percent_to_sigma(p)), rel=1e-5) for p in (0.1, 0.5, 0.9)]
    expected = sampling.noise_scaling(sigma, noise.clone(), x0, False)
    torch.testing.assert_close(process.noisy(x0, noise, sigma), expected)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_it_learns_is_used_and_leaves_the_model_alone(kind):
    model = MODELS[kind]()
    before, options = sample(model), repr(model.model_options)
    result = train(model, steps=40, batch_size=4)
    head, facts = result.head, result.head.facts
    assert len(result.loss_map["loss"]) == 40
    assert "it learned" in result.report and "no nearer" not in result.report
    assert (facts.latent_format, facts.prediction, facts.cfg) == ("SD15", kind, 5.0)
    assert facts.steps == 40 and facts.data == "4 latents" and len(facts.gate) == 8
    assert facts.details["metric"] == "none" and float(facts.details["held_out_loss"]) > 0
    assert not any(w.is_inference() or w.requires_grad for w in head.weights.values())
    assert torch.equal(sample(model), before) and repr(model.model_options) == options
    assert all(p.grad is None for p in model.model.parameters())
    worn = sample(put(model, head))
    assert worn.isfinite().all() and not torch.allclose(worn, before, rtol=1e-2)
    assert not comfy.model_management.in_training
    with torch.inference_mode():
        LossGraphNode.execute(result.loss_map, "loss")


def test_a_saved_head_trains_on():
    model = unet(0)
    first = train(model).head
    comfy_train_node.save_head(*comfy_train_node.to_file(first), "cas_dm/head")
    (name,) = head_files()
    with torch.inference_mode():
        read = read_head(name)
    second = train(model, head=read, steps=4, size="large")
    assert second.head.facts.steps == 10 and second.head.config == first.config
    assert "resumed at step 6" in second.report and not same(second.head, first)


def test_lists_of_sizes_each_with_its_prompt():
    model = unet(0)
    samples = [latents(2), latents(1, size=(6, 10), seed=1), latents(3, seed=2)]
    prompts = [[conditioning(seed)[0]] for seed in range(40, 46)]
    result = train(model, samples, prompts)
    assert "6 latents of 2 size(s)" in result.report
    # one conditioning of all prompts, as Conditioning (Combine) makes them
    assert same(train(model, samples, [p for prompt in prompts for p in prompt]).head, result.head)
    assert not same(train(model, samples, prompts[::-1]).head, result.head)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("metric", ["clip_vision", "l1", "huber"])
def test_metrics_of_pictures(vae, metric, checkpointing):
    model = unet(0, latent_format=Scaled)
    samples = latents(channels=12, size=(8, 6))
    result = train(model, samples, metric=metric, vae=vae, clip_vision=tiny_encoder(), crop=24, metric_weight=2.0,
                   gradient_checkpointing=checkpointing)  # fmt: skip
    assert len(result.loss_map["metric"]) == 6 and all(v > 0 for v in result.loss_map["metric"])
    assert f"{metric}: model" in result.report
    assert result.head.facts.details["metric"] == metric
    plain = train(model, samples, metric=metric, vae=vae, clip_vision=tiny_encoder(), metric_weight=0.0)
    assert "metric" not in plain.loss_map and not same(plain.head, result.head)


def test_l1_needs_no_vae():
    result = train(unet(0), metric="l1")
    assert len(result.loss_map["metric"]) == 6


@pytest.mark.parametrize("encoder", ["clip", "siglip", "demo"])
def test_features_and_pictures_are_the_hosts(vae, encoder):
    make = {"siglip": lambda: tiny_encoder("siglip_vision_model"), "demo": modules.load_vision}.get(
        encoder, tiny_encoder
    )
    model = unet(0, latent_format=Scaled)
    with torch.inference_mode():
        encoder = make()
        z = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(1))
        expected = vae.decode(model.model.process_latent_out(z)).clone()
        encoder.return_all_hidden_states = True
        outputs = [encoder.encode_image(p) for p in expected.split(1)]
        encoder.return_all_hidden_states = False
    layers = torch.cat([o["all_hidden_states"] for o in outputs]).clone()
    embeds = torch.cat([o["image_embeds"] for o in outputs]).clone()
    gradients = []
    for checkpoint in (True, False):
        with training_gradients():
            seen = TrainingPictures(model, vae, encoder, checkpoint)
            with seen.recording():
                x = z.clone().requires_grad_(True)
                pictures = seen.decode(x)
                features = seen.features(pictures, join_features)
                (features[:, ::3].sum() + pictures.square().mean()).backward()
        torch.testing.assert_close(pictures.detach(), expected)
        by_hand = join_features([*layers.unbind(1), embeds.mean(1) if embeds.ndim == 3 else embeds])
        torch.testing.assert_close(features.detach(), by_hand, rtol=1e-3, atol=1e-5)
        gradients.append(x.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_a_cache_of_all_steps_gives_the_same_head_and_unloads_the_model(monkeypatch):
    model, unloaded = unet(0), []
    monkeypatch.setattr(Guided, "unload", lambda self: unloaded.append(self.model))
    plain = train(model, gradient_accumulation=2)
    assert unloaded == []
    cached = train(model, gradient_accumulation=2, cached_steps=50)
    assert same(plain.head, cached.head) and plain.loss_map == cached.loss_map and unloaded == [model]
    assert not same(train(model, gradient_accumulation=2, cached_steps=2).head, plain.head)


def test_an_unloaded_model_is_gone_from_memory():
    model = unet(0)
    asked = Guided(model, *WORDS, 5.0, 1)
    asked(torch.randn(1, 4, 8, 8), torch.ones(1), [0])
    mine = lambda: any(m.model.model is model.model for m in comfy.model_management.current_loaded_models)  # noqa: E731
    assert mine()
    asked.unload()
    assert not mine()


def test_an_interrupt_keeps_what_was_learned(caplog):
    samples, asked = latents(3), 3 * 8  # before the first step, the held-out pictures at every level
    stopped = stop_at(unet(0), asked + 3 * 2 + 1)
    with caplog.at_level(logging.WARNING), pytest.raises(comfy.model_management.InterruptProcessingException):
        train(stopped, samples, validation_fraction=0.0)
    (name,) = head_files()
    assert name.startswith("cas_dm/head_interrupted_step3_") and "what was learned until here is in" in caplog.text
    assert read_head(name).facts.steps == 3
    assert not comfy.model_management.in_training
    # before the first step there is nothing to keep
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(stop_at(unet(0), 2), samples)
    assert head_files() == [name]


def test_a_loss_that_is_no_number_ends_it_and_the_error_says_where_the_good_one_is(monkeypatch):
    calls = []  # 4 in each of 16 batches before the first step, then one a step

    def spoiled(a, b):
        calls.append(1)
        found = l1(a, b)
        return found * torch.nan if len(calls) == 69 else found

    monkeypatch.setitem(training_metrics.OF_NUMBERS, "l1", spoiled)
    with pytest.raises(
        ValueError, match=r"NaN or infinite.*lower the learning rate.*learned before is in .*_failed_step"
    ):
        train(unet(0), metric="l1", steps=100)
    (name,) = head_files()
    assert all(w.isfinite().all() for w in read_head(name).weights.values())


def test_checkpoints():
    result = train(unet(0), steps=5, checkpoint_every=2, checkpoint_prefix="mine/x")
    names = head_files()
    assert names == [f"mine/x_step{n}_00001_.cas_dm.safetensors [output]" for n in (2, 4)]
    assert [read_head(name).facts.steps for name in names] == [2, 4]
    assert result.head.facts.steps == 5


@pytest.fixture
def worse_after(monkeypatch):
    """``worse_after(done)``: from then on the head is spoiled by every step, as one that overfits."""

    def of(done):
        follow = TrainingLoop.update_average

        def spoiled(self):
            if self.done > done:
                with torch.no_grad():
                    self.parameters[-1].add_(1.0)
            follow(self)

        monkeypatch.setattr(TrainingLoop, "update_average", spoiled)

    return of


def test_the_best_that_was_looked_at_is_handed_out(worse_after):
    plain = train(unet(0), steps=4, ema_decay=0.0)
    worse_after(4)
    result = train(unet(0), steps=8, ema_decay=0.0, preview_every=4)
    assert same(result.head, plain.head) and result.head.facts.steps == 4
    assert result.head.facts.details["held_out_loss"] == plain.head.facts.details["held_out_loss"]
    assert len(result.loss_map["loss"]) == 8
    assert "8 steps of" in result.report and "after 4 steps of this run, where it was lowest" in result.report
    # where nothing was looked at on the way, the last weights are the only ones
    assert train(unet(0), steps=8, ema_decay=0.0).head.facts.steps == 8


def test_checkpoints_say_how_good_they_are(worse_after):
    worse_after(2)
    result = train(unet(0), steps=6, ema_decay=0.0, checkpoint_every=2)
    losses = [float(read_head(name).facts.details["held_out_loss"]) for name in head_files()]
    assert len(losses) == 2 and losses[1] > losses[0]
    assert result.head.facts.steps == 2 and float(result.head.facts.details["held_out_loss"]) == losses[0]


def test_an_interrupt_keeps_the_best_that_was_looked_at(worse_after):
    # asked in the same way, and never stopped
    plain = train(stop_at(unet(0), 1000), latents(3), steps=2, ema_decay=0.0, validation_fraction=0.0)
    worse_after(2)
    asked = 3 * 8  # before the first step, the held-out pictures at every level
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stopped = stop_at(unet(0), asked + 4 * 2 + 1)
        train(stopped, latents(3), steps=9, ema_decay=0.0, validation_fraction=0.0, preview_every=2)
    (name,) = head_files()
    assert name.startswith("cas_dm/head_interrupted_step2_")
    kept = read_head(name)
    for key, weight in plain.head.weights.items():
        assert torch.equal(kept.weights[key], weight.half())


def test_where_the_last_cannot_be_evaluated_they_are_kept(monkeypatch, caplog):
    restored = []

    def no_room(self):
        restored.append(1)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(TrainingLoop, "restore_best", no_room)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(stop_at(unet(0), 3 * 8 + 3 * 2 + 1), latents(3), steps=9, validation_fraction=0.0, preview_every=2)
    (name,) = head_files()
    assert restored == [1] and "_interrupted_step3_" in name and "could not be evaluated; they are kept" in caplog.text


def files(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_a_full_disk_ends_no_training(folders, full_disk, caplog):
    result = train(unet(0), steps=5, checkpoint_every=2)
    assert result.head.facts.steps == 5 and same(result.head, train(unet(0), steps=5).head)
    for done in (2, 4):
        assert f"NOT written: the checkpoint after {done} steps: [Errno 28] No space left on device" in result.report
    assert caplog.text.count("a checkpoint could not be written; the training goes on") == 2
    assert files(folders / "output") == []
    with torch.inference_mode(), pytest.raises(OSError, match="No space left on device"):
        cas_dm.SaveCasDMHead.execute(result.head, "cas_dm/head")
    assert files(folders / "output") == []


def test_on_a_full_disk_an_interrupt_is_still_one(folders, full_disk, caplog):
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(stop_at(unet(0), 3 * 8 + 3 * 2 + 1), latents(3), validation_fraction=0.0)
    assert "what was learned could not be saved" in caplog.text and "No space left on device" in caplog.text
    assert files(folders / "output") == []


def test_bfloat16_is_for_devices_that_have_it(monkeypatch):
    model = unet(0)
    assert training_place(model) == (torch.device("cpu"), torch.float32)
    model.load_device = torch.device("meta")  # stands for a GPU
    for has in (True, False):
        monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda device, has=has: has)
        assert training_place(model) == (model.load_device, torch.bfloat16 if has else torch.float32)


@pytest.mark.parametrize("with_vae", [True, False])
def test_held_out_pictures_are_shown(vae, with_vae, monkeypatch):
    sheets = []
    draw = comfy_train_node.draw_examples
    monkeypatch.setattr(
        comfy_train_node, "draw_examples", lambda rows: sheets.append((rows, draw(rows))) or sheets[-1][1]
    )
    model = unet(0, latent_format=Scaled) if with_vae else unet(0)
    result = train(model, steps=4, preview_every=2, **({"vae": vae} if with_vae else {}))
    assert len(result.ui.as_dict()["images"]) == 1
    assert len(sheets) == 3  # twice on the way, once at the end
    rows, sheet = sheets[-1]
    assert sheet.ndim == 3 and sheet.shape[-1] == 3 and 0 <= sheet.min() < sheet.max() <= 1
    assert len(rows) == 4 and all(len(pictures) == 4 for _, _, pictures in rows)
    assert rows[0][2][0].shape == ((32, 32, 3) if with_vae else (8, 8, 3))


@in_inference_mode
def nested():
    return {"samples": comfy.nested_tensor.NestedTensor([torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8)])}


REFUSED = {
    "no latents": (dict(samples={"samples": torch.zeros(0, 4, 8, 8)}), "samples holds nothing, its size is 0x4x8x8"),
    "an empty list": (dict(samples=[]), "samples hold no latents; load pictures and encode them"),
    "other channels": (dict(samples=latents(channels=16)), r"samples are \(4, 16, 8, 8\).* works on latents of 4 channels"),
    "nested latents": (lambda: dict(samples=nested()), "nested latents"),
    "not finite": (lambda: dict(samples={"samples": torch.full((1, 4, 8, 8), torch.nan)}), "NaN or infinite; encode"),
    "head of other channels": (
        lambda: dict(head=head_for(MODELS["flux"]())),
        r"made for latents of the format Flux \(16 channels\), this model has SD15 \(4 channels\)",
    ),
    "head of v": (lambda: dict(head=head_for(unet(0, "v"))), "trained on a model that predicts v, this one predicts eps"),
    "head of another scale": (lambda: dict(head=head_for(unet(0), cfg=2.0)), "trained on predictions at cfg 2, and cfg is 5"),
    "no vae": (dict(metric="clip_vision"), "the metric clip_vision compares pictures and needs vae and clip_vision; wire"),
    "lpips without a vae": (dict(metric="lpips alex"), "needs vae; wire it"),
    "no negative": (dict(negative=None), "negative is not wired, and cfg 5 guides away from it"),
    "prompts": (dict(positive=WORDS[0] * 3), "3 prompts in positive for 4 latents"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    inputs, message = REFUSED[case]
    inputs = inputs() if callable(inputs) else dict(inputs)
    with pytest.raises(ValueError, match=message):
        train(unet(0), **inputs)
    assert head_files() == []


@in_inference_mode
def test_lists_of_what_there_is_one_of_are_refused():
    widgets = {k: [v] for k, v in {**defaults(TrainCasDMHead), **QUICK}.items()}
    with pytest.raises(ValueError, match="negative holds a list of 2; wire a single one"):
        TrainCasDMHead.execute(
            **widgets, model=[unet(0)], samples=[latents()], positive=[WORDS[0]], negative=[WORDS[1]] * 2
        )


def test_a_metric_without_an_encoder_is_refused(vae):
    with pytest.raises(ValueError, match="the metric clip_vision compares pictures and needs clip_vision; wire it"):
        train(unet(0, latent_format=Scaled), metric="clip_vision", vae=vae)


def test_a_blend_needs_its_negative():
    blended = blend(unet(0), unet(1))[0]
    with pytest.raises(ValueError, match="the blend on the model compares with it"):
        train(blended, negative=None, cfg=1.0)


def test_latents_come_in_the_models_scale():
    model = unet(0, latent_format=comfy.latent_formats.SDXL)
    (first, *_) = read_latents(model, [latents()])
    torch.testing.assert_close(first, model.model.process_latent_in(latents()["samples"])[0].clone())
    assert not first.is_inference()


INPUTS = (
    "model samples positive negative cfg vae clip_vision head metric metric_weight steps batch_size learning_rate seed"
    " gradient_accumulation size gate condition_on_x_t gate_weights ema_decay crop validation_fraction cached_steps checkpoint_every checkpoint_prefix"
    " preview_every gradient_checkpointing"
).split()


def test_the_node_is_that_of_the_design():
    (node,) = cas_dm_train.NODES
    schema = node.define_schema()
    assert (schema.node_id, schema.category, schema.is_input_list) == ("TrainCasDMHead", "chorus/train", True)
    assert [i.id for i in schema.inputs] == INPUTS
    assert set(inspect.signature(node.execute).parameters) == set(INPUTS)
    assert [o.io_type for o in schema.outputs] == ["CAS_DM_HEAD", "LOSS_MAP", "STRING"]
    assert {i.id for i in schema.inputs if i.optional} == {"negative", "vae", "clip_vision", "head"}
    assert all(i.tooltip for i in schema.inputs) and schema.description
    assert all(i.advanced for i in schema.inputs[INPUTS.index("gradient_accumulation") :])
