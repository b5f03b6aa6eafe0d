"""Gradients from the finished latent back to the noise, through the host's own sampling; and what they leave behind."""

import gc
import weakref

import comfy.clip_vision
import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.taesd.taesd
import comfy_extras.nodes_easycache
import comfy_extras.nodes_model_advanced
import pytest
import torch
from torch.nn.functional import normalize

from chorus.demo import modules
from chorus.host import autograd_copies
from chorus.host.gradients import Recorder
from chorus.techniques.saliency_blend.comfy_hook import blend_chain
from chorus.techniques.seed_select import comfy_differentiable, comfy_session
from chorus.tests.support.gradients import (
    direction_of,
    easy,
    finite_difference,
    gradient,
    loss_of,
    run_of,
    session,
    tiny_encoder,
)
from chorus.tests.support.lifecycle import check_untouched, stop_at
from chorus.tests.support.seeds import WORDS, content, only, with_control
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    flux,
    in_inference_mode,
    ksample,
    latent,
    lora,
    recording,
    unet,
)

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERT_WORDS = conditioning(30), conditioning(31)


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return modules.load_checkpoint("general")[2]


@in_inference_mode
def hooked(model, positive=True, negative=True, keyframes=()):
    """WORDS with a LoRA of all attention layers hooked on."""
    generator, weights = torch.Generator().manual_seed(8), {}
    for key, w in model.model.state_dict().items():
        if "attn" in key and key.endswith(".weight"):
            name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
            weights[f"{name}.lora_up.weight"] = 0.2 * torch.randn(w.shape[0], 2, generator=generator)
            weights[f"{name}.lora_down.weight"] = 0.2 * torch.randn(2, w.shape[1], generator=generator)
    hooks = comfy.hooks.create_hook_lora(weights, 1.0, 0.0)
    for strength in keyframes:
        group = hooks.hooks[0].hook_keyframe
        group.add(comfy.hooks.HookKeyframe(strength, start_percent=0.5 * len(group.keyframes)))
    on = positive, negative
    return [comfy.hooks.set_hooks_for_conditioning(w, hooks) if o else w for w, o in zip(WORDS, on, strict=True)]


def half():
    return (torch.arange(16) < 8).float().expand(1, 16, 16).clone()


def soft():
    return blend(unet(0), unet(1), *EXPERT_WORDS, mask_mode="soft")[0]


def forced():
    """A hard mask that no rounding moves, so that finite differences exist."""
    return blend(unet(0), lora(unet(1), 2), *EXPERT_WORDS, region=half(), region_mode="force")[0]


CASES = {
    "eps": lambda: run_of(unet(0)),
    "v": lambda: run_of(unet(1, "v")),
    "flow": lambda: run_of(unet(2, "flow")),
    "flux": lambda: run_of(flux(3)),
    "lora": lambda: run_of(lora(unet(0), 1, strength=0.3)),
    "soft blend": lambda: run_of(soft()),
    "hard blend": lambda: run_of(forced()),
    "hooks": lambda: run_of(unet(0), words=hooked(unet(0))),
    "mask": lambda: run_of(unet(0), content(mask=True), denoise=0.6),
    "sampling node": lambda: run_of(as_x0(unet(1))),
    "demo": lambda: demo_run(),
}


@in_inference_mode
def as_x0(model):
    return comfy_extras.nodes_model_advanced.ModelSamplingDiscrete().patch(model, "x0", False)[0]


def demo_run(**settings):
    with torch.inference_mode():
        model, clip, _ = modules.load_checkpoint("general")
        words = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat", "")]
        return run_of(model, latent(channels=12), words, cfg=4.0, **settings)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_finite_differences(case):
    run = CASES[case]()
    _, found = gradient(run, late=2)
    direction = direction_of(found)
    expected = finite_difference(run, direction, late=2)
    # of a random direction: a fair share of what its length allows, so that a lost part would show
    assert abs(expected) > 0.01 * float(found.norm())
    assert float((found * direction).sum()) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("sampler", comfy_session.STEPPERS)
def test_every_sampler_has_its_gradient(sampler):
    run = run_of(unet(0), content(mask=sampler != "ddim"))
    _, found = gradient(run, sampler=sampler, seed=4)
    direction = direction_of(found)
    expected = finite_difference(run, direction, sampler=sampler, seed=4)
    assert float((found * direction).sum()) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("case", [c for c in CASES if c != "demo"])
def test_with_and_without_checkpointing_are_the_same_to_rounding(case):
    run = CASES[case]()
    (loss, found), (plain_loss, plain) = gradient(run, late=3), gradient(run, late=3, checkpoint=False)
    assert torch.equal(loss, plain_loss)
    assert (found - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("sampler", comfy_session.STEPPERS)
@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_the_path_is_ksamplers_to_the_bit(kind, sampler, mask):
    if sampler == "ddim" and mask:
        pytest.skip("refused")
    model = unet(2, kind)
    run = run_of(model, content(mask), denoise=0.7, sampler_name=sampler)

    def work(s):
        z = run.noise_of(5).requires_grad_(True)
        return s.to_latent(s.generate(z)[-1]).detach()

    expected = ksample(model, *WORDS, content(mask), sampler=sampler, denoise=0.7, seed=5)
    assert torch.equal(session(run, work, sampler=sampler, seed=5), expected)
    assert torch.equal(session(run, work, sampler=sampler, seed=5, gradients=False), expected)


def test_the_path_of_a_flux_is_ksamplers_to_rounding():
    """In training the host takes another kernel for the rotary embedding."""
    model = flux(3)
    run = run_of(model)
    found = session(run, lambda s: s.to_latent(s.generate(run.noise_of(5).requires_grad_(True))[-1]).detach())
    expected = ksample(model, *WORDS, latent(channels=16), seed=5)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_late_latents_are_in_vp_scale_or_estimates():
    for kind in ("eps", "flow"):
        model, calls = recording(unet(2, kind))
        run = run_of(model)
        late = session(run, lambda s, run=run: s.generate(run.noise_of(3), 3), gradients=False)
        sigmas = run.sigmas()
        for k in (0, 1):
            expected = calls[k].denoised
            if kind == "eps":
                expected = calls[k + 1].x / (1 + sigmas[k + 1] ** 2) ** 0.5
            assert torch.allclose(late[k], expected, rtol=1e-5, atol=1e-6)
        assert torch.allclose(late[2], calls[2].denoised, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last_steps", [1, 2])
def test_truncation_holds_the_earlier_steps_constant(last_steps):
    run = run_of(unet(0))
    _, found = gradient(run, last_steps=last_steps)
    spent = run.counter.recomputed

    def work(s):
        z = run.noise_of(3).requires_grad_(True)
        x, sigmas = s.start(z), s.sigmas
        for i in range(3):
            x0 = s.denoise(x, sigmas[i])
            if i < 3 - last_steps:
                x0 = x0.detach()
            x = x + (x - x0) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        loss_of([x]).backward()
        return z.grad

    expected = session(run, work)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert spent == 2 * last_steps
    assert (found - gradient(run)[1]).norm() > 0.01 * expected.norm()


class Kept:
    """Bytes that autograd keeps from a block on, weights aside."""

    def __init__(self, *modules):
        self.weights = {t.data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
        self.tensors = {}

    def pack(self, tensor):
        if tensor.untyped_storage().data_ptr() not in self.weights:
            self.tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def total(self):
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())


def kept_over(steps, checkpoint):
    """(bytes kept after the forward pass, what the recorder says of one step)."""
    run, told = run_of(unet(0)), {}

    def work(s):
        told["recorder"], kept = s._recorder, Kept()
        # with this context the host's in-place additions meet nothing that they may not change
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
            z = run.noise_of(3).requires_grad_(True)
            loss = loss_of(s.generate(z))
        del loss
        return kept.total

    return session(run, work, steps=steps, checkpoint=checkpoint), told["recorder"].sizes["denoiser"]


def test_what_is_kept_does_not_grow_with_the_steps():
    """But for two latents a step: what went in, and a sample of what came out."""
    one = 4 * 16 * 16 * 4
    (few, step), (many, same) = kept_over(2, True), kept_over(8, True)
    assert step == same
    assert step > 50 * one
    assert many - few <= 6 * 2.1 * one
    (few, _), (many, _) = kept_over(2, False), kept_over(8, False)
    assert many > 3 * few
    assert few > step  # the measure of a step is no larger than what autograd really keeps for two


def test_the_measured_step_is_what_autograd_keeps():
    run, found = run_of(unet(0)), {}

    def work(s):
        kept = Kept(s._guider.inner_model)
        x = s.start(run.noise_of(3)).requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
            s.denoise(x, s.sigmas[0])
        found["kept"], found["measured"] = kept.total, s._recorder.sizes["denoiser"]

    session(run, work, checkpoint=False)
    assert found["measured"] == pytest.approx(found["kept"], rel=0.02)


def test_forwards_and_their_repetitions_are_counted():
    run = run_of(soft())
    gradient(run)
    assert run.counter.rows == 2 * 2 * 3 * 2  # two models, guidance, three steps, twice
    assert run.counter.recomputed == 2 * 2 * 3


def test_samples_are_computed_one_by_one():
    run = run_of(forced())

    def work(s):
        z = torch.cat([run.noise_of(k) for k in (3, 4)]).requires_grad_(True)
        loss_of(s.generate(z)).backward()
        return z.grad * 2  # of a mean over two

    both = session(run, work)
    for k in range(2):
        assert torch.allclose(both[k : k + 1], gradient(run, seed=3 + k)[1], rtol=1e-5)


def test_start_and_noise_are_inverse_and_the_scales_too():
    for kind in ("eps", "v", "flow"):
        run = run_of(unet(2, kind), content(), denoise=0.6)

        def work(s, run=run, kind=kind):
            z = run.noise_of(1)
            assert torch.allclose(s.noise_of(s.start(z)), z, atol=1e-5)
            latents = content()["samples"]
            assert torch.allclose(s.to_latent(s.to_model(latents)), latents, atol=1e-6)
            assert s.flow == (kind == "flow")

        session(run, work, gradients=False)


def test_denoise_gives_the_guided_predictions_of_a_run():
    model, calls = recording(unet(0))
    ksample(model, *WORDS, latent(), seed=1)
    asked = [(c.x.clone(), c.sigma.clone(), c.denoised.clone()) for c in calls]
    run = run_of(model, content(mask=True))  # which it does not apply

    def work(s):
        for x, sigma, denoised in asked:
            assert torch.equal(s.denoise(x, sigma), denoised)
            assert torch.equal(s.denoise(torch.cat([x, x]), float(sigma))[1:], denoised)

    session(run, work, gradients=False)
    other = session(run_of(model), lambda s: s.denoise(*asked[0][:2]), gradients=False, cfg=1.0)
    assert not torch.equal(other, asked[0][2])


# what is left behind


def plain(model):
    return ksample(model, *WORDS, latent(), seed=1)


def family():
    base = unet(0)
    return {"base": lora(base, 1), "stack": lora(base, 2), "other": unet(1)}


def blend_of(models):
    chained, _ = blend(models["base"], models["stack"], *EXPERT_WORDS)
    return blend(chained, models["other"], *EXPERT_WORDS)


def unpatched(model):
    comfy.model_management.unload_all_models()
    return list(model.model.parameters())


def fail(*args):
    raise RuntimeError("a loss that fails")


@pytest.mark.parametrize("end", ["finished", "interrupted", "failed"])
@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpointed", "plain"])
def test_every_model_samples_as_before(end, checkpoint):
    models = family()
    before = {name: plain(m) for name, m in models.items()}
    blended, trace = blend_of(models)
    picture = plain(blended)
    record, weights = trace.record, [p.clone() for p in unpatched(models["base"])]
    if end == "finished":
        gradient(run_of(blended), checkpoint=checkpoint)
    elif end == "interrupted":
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            gradient(run_of(stop_at(blended, 5 if checkpoint else 2)), checkpoint=checkpoint)
    else:
        with pytest.raises(RuntimeError, match="a loss that fails"):
            session(run_of(blended), fail, checkpoint=checkpoint)
    assert not comfy.model_management.in_training
    assert not torch.is_inference_mode_enabled()
    assert trace.record is record
    check_untouched(models)
    assert all(torch.equal(p, q) for p, q in zip(unpatched(models["base"]), weights, strict=True))
    for name, model in models.items():
        assert not model.model.diffusion_model._forward_pre_hooks
        assert torch.equal(plain(model), before[name])
    assert torch.equal(plain(blended), picture)


def test_the_hosts_switch_is_on_inside_and_as_before_after_it(monkeypatch):
    seen = []
    session(
        run_of(unet(0)), lambda s: seen.append((comfy.model_management.in_training, torch.is_inference_mode_enabled()))
    )
    assert seen == [(True, False)]
    monkeypatch.setattr(comfy.model_management, "in_training", True)  # as inside a training node
    session(run_of(unet(0)), lambda s: None)
    assert comfy.model_management.in_training


def test_the_copies_share_the_weights_memory_and_are_gone_after_the_session():
    run, copies = run_of(unet(0)), []

    def work(s):
        own, theirs = (dict(m.named_parameters()) for m in (s._guider.inner_model, run.model.model))
        assert not any(p.is_inference() or p.requires_grad for p in own.values())
        assert all(p.is_inference() and p.data_ptr() == own[name].data_ptr() for name, p in theirs.items())
        copies.append(weakref.ref(s._guider.inner_model))
        loss_of(s.generate(run.noise_of(3).requires_grad_(True))).backward()

    session(run, work)
    gc.collect()
    assert copies[0]() is None


def test_patched_weights_count_as_no_activations():
    sizes = []
    for model in (unet(0), lora(unet(0), 1)):
        run = run_of(model)

        def work(s, run=run):
            s.generate(run.noise_of(3).requires_grad_(True))
            return s._recorder.sizes["denoiser"]

        sizes.append(session(run, work))
    assert sizes[0] == sizes[1]


def test_weights_that_autograd_may_save_are_not_copied():
    with torch.inference_mode(False):
        model = unet.__wrapped__(0)
    model.model.requires_grad_(False)
    run = run_of(model)
    assert session(run, lambda s: s._guider.inner_model is model.model)
    _, found = gradient(run)
    assert torch.equal(found, gradient(run_of(unet(0)))[1])


def test_a_shared_checkpoint_is_copied_once():
    base = unet(0)
    run = run_of(blend(base, base, *EXPERT_WORDS)[0])

    def work(s):
        chain = blend_chain(s._guider.model_patcher)
        return chain.experts[0].patcher.model is s._guider.inner_model is not base.model

    assert session(run, work)


# pictures


ENCODERS = {
    "clip": tiny_encoder,
    "siglip": lambda: tiny_encoder("siglip_vision_model"),
    "demo": modules.load_vision,
}


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (32, 32)], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings_are_those_of_encode_image(name, size):
    with torch.inference_mode():
        encoder = ENCODERS[name]()
        image = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(1)) * 1.1
        for crop in (True, False):
            expected = encoder.encode_image(image, crop=crop)["image_embeds"]
            expected = expected.mean(1) if expected.ndim == 3 else expected
            run = run_of(unet(0))
            for gradients in (True, False):
                found = session(
                    run,
                    lambda s, c=crop, g=gradients: s.embed(image.clone().requires_grad_(g), c).detach(),
                    gradients=gradients,
                    clip_vision=encoder,
                )
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
            alone = [encoder.encode_image(image[k : k + 1], crop=crop)["image_embeds"] for k in range(2)]
            if expected.shape == alone[0].shape[:1] * 2 + alone[0].shape[1:]:
                assert torch.equal(found, torch.cat(alone))


@pytest.mark.parametrize("name", ENCODERS)
def test_the_gradient_passes_straight_through_the_rounding(name):
    with torch.inference_mode():
        encoder = ENCODERS[name]()
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    target = torch.randn(1, 1, generator=torch.Generator().manual_seed(2))

    def work(s):
        def f(x):
            e = normalize(s.embed(x), dim=-1)
            return (e * torch.linspace(-1, 1, e.shape[-1])).sum() * target.sum()

        x = image.clone().requires_grad_(True)
        f(x).backward()
        direction = x.grad / x.grad.norm()
        with torch.no_grad():  # a step of many eighths of a bit in every pixel that matters
            h = 0.5
            return float(x.grad.norm()), float(f(image + h * direction) - f(image - h * direction)) / (2 * h)

    found, expected = session(run_of(unet(0)), work, clip_vision=encoder)
    assert found > 1e-4
    assert found == pytest.approx(expected, rel=0.15)


@in_inference_mode
def taesd():
    weights = comfy.taesd.taesd.TAESD().state_dict()
    generator = torch.Generator().manual_seed(1)
    for w in weights.values():
        if w.ndim > 0:  # vae_scale and vae_shift are numbers
            w.copy_(torch.randn(w.shape, generator=generator) * w[0].numel() ** -0.5 * (w.ndim > 1))
    return comfy.sd.VAE(sd=weights)


VAES = {"demo": (lambda: modules.load_checkpoint("general")[2], 12), "taesd": (taesd, 4)}


@pytest.mark.parametrize("name", VAES)
def test_pictures_are_those_of_the_vae(name):
    make, channels = VAES[name]
    latents = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        vae = make()
        expected = torch.cat([vae.decode(z) for z in latents.split(1)])
    for gradients in (True, False):
        work = lambda s, g=gradients: s.decode(latents.clone().requires_grad_(g)).detach()  # noqa: E731
        assert torch.equal(session(run_of(unet(0)), work, gradients=gradients, vae=vae), expected)


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpointed", "plain"])
@pytest.mark.parametrize("name", VAES)
def test_the_gradient_of_a_picture_is_that_of_finite_differences(name, checkpoint):
    make, channels = VAES[name]
    with torch.inference_mode():
        vae = make()
    latents = 0.3 * torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(1))

    def work(s):
        def f(z):
            return (s.decode(z).double() ** 2).mean()

        z = latents.clone().requires_grad_(True)
        f(z).backward()
        with torch.no_grad():
            # along the gradient: elsewhere the kinks of ReLU and clipping are as large as what is left
            direction, h = z.grad / z.grad.norm(), 0.03
            return float(z.grad.norm()), float(f(z + h * direction) - f(z - h * direction)) / (2 * h)

    found, expected = session(run_of(unet(0)), work, vae=vae, checkpoint=checkpoint)
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpointed", "plain"])
def test_from_embedding_to_noise_the_score_falls(vae, checkpoint):
    """Noise, two steps, VAE, encoder, and all the way back; with the demo checkpoint."""
    run = demo_run()
    with torch.inference_mode():
        encoder = modules.load_vision()

    def work(s):
        with torch.no_grad():
            aim = normalize(s.embed(s.decode(s.to_latent(s.generate(run.noise_of(8))[-1]))), dim=-1)
        z, scores = run.noise_of(1).requires_grad_(True), []
        adam = torch.optim.Adam([z], lr=0.05)
        for _ in range(4):
            adam.zero_grad()
            embeds = s.embed(s.decode(s.to_latent(s.generate(z)[-1])))
            loss = 1 - (normalize(embeds, dim=-1) * aim).sum()
            loss.backward()
            adam.step()
            scores.append(float(loss))
        return scores

    scores = session(run, work, steps=2, vae=vae, clip_vision=encoder, checkpoint=checkpoint)
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.9 * scores[0]


# refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: run_of(unet(0), words=with_control(WORDS)), "carries a ControlNet"),
        (lambda: run_of(blend(unet(0), unet(1), *with_control(EXPERT_WORDS))[0]), "carries a ControlNet"),
        (lambda: run_of(unet(0), words=hooked(unet(0), negative=False)), "hooks change the weights within a run"),
        (lambda: run_of(unet(0), words=hooked(unet(0), keyframes=(1.0, 0.5))), "without keyframes"),
        (lambda: run_of(blend(unet(0), unet(1), hooked(unet(1))[0])[0]), "hooks change the weights within a run"),
        (lambda: run_of(easy(unet(0))), "EasyCache"),
        (lambda: run_of(blend(unet(0), easy(unet(1)))[0]), "EasyCache"),
        (lambda: run_of(blend(unet(0), unet(1), refresh=3, label="signs")[0]), "refresh 3 of the expert 'signs'.*to 1"),
        (lambda: run_of(blend(unet(0), unet(1), skip_below=0.1)[0]), r"skip_below 0\.1"),
        (lambda: run_of(blend(unet(0), unet(1), crop_margin=2)[0]), "crop_margin 2"),
    ],
    ids="control expert-control hooks keyframes expert-hooks easycache expert-easycache refresh skip crop".split(),
)
def test_what_has_no_gradient_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        gradient(make())


def test_models_and_attention_without_a_derivative_are_refused(monkeypatch):
    model = unet(0)
    monkeypatch.setattr(comfy.model_base, "Anima", type(model.model))
    with pytest.raises(ValueError, match=r"BaseModel computes its rotary embedding.*mode search"):
        gradient(run_of(model))
    monkeypatch.undo()
    monkeypatch.setattr(
        comfy_differentiable.attention, "optimized_attention", comfy_differentiable.attention.attention_sage
    )
    with pytest.raises(ValueError, match="without --use-sage-attention"):
        gradient(run_of(model))


def patched(change):
    model = unet(0).clone()
    model.set_model_sampler_post_cfg_function(lambda a: change(a["denoised"]))
    return run_of(model)


def test_a_patch_that_draws_at_random_is_found_out():
    with pytest.raises(ValueError, match=r"gave another result .* draws at random or remembers"):
        gradient(patched(lambda x: x * (1 + 0.1 * torch.randn_like(x))))


def test_a_patch_that_cuts_the_gradient_is_found_out():
    for checkpoint in (True, False):
        with pytest.raises(ValueError, match="denoiser passes no gradient on"):
            gradient(patched(lambda x: x.detach()), checkpoint=checkpoint)


def test_a_gradient_that_does_not_fit_is_refused_with_its_size(monkeypatch):
    only(2**20, monkeypatch)
    with pytest.raises(
        MemoryError,
        match=r"gradient of the denoiser needs .* GiB on cpu \(measured\), 0.00 GiB are free; set cfg to 1 \(about half",
    ):
        gradient(run_of(unet(0)))
    with pytest.raises(MemoryError, match="switch checkpointing on, lower last_steps, set cfg to 1"):
        gradient(run_of(unet(0)), checkpoint=False)
    with pytest.raises(MemoryError, match="free; use a smaller latent_image"):
        gradient(run_of(unet(0), cfg=1.0))


def test_a_vae_whose_gradient_does_not_fit_is_refused(vae, monkeypatch):
    def decode(s):
        with monkeypatch.context() as patch:
            only(1000, patch)
            s.decode(torch.zeros(1, 12, 16, 16, requires_grad=True))

    with pytest.raises(MemoryError, match="gradient of the VAE needs"):
        session(run_of(unet(0)), decode, vae=vae)


def test_a_result_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="denoiser is not finite"):
        gradient(patched(lambda x: x * float("nan")))


def test_a_model_that_is_not_loaded_as_a_whole_is_refused(monkeypatch):
    model = unet(0)
    copied = autograd_copies._copied_module

    def partly(patcher):
        override = copied(patcher)
        override[0].__class__ = type(
            "PartlyLoaded", (type(override[0]),), {"model_lowvram": property(lambda s: True, lambda s, v: None)}
        )
        return override

    monkeypatch.setattr(autograd_copies, "_copied_module", partly)
    with pytest.raises(MemoryError, match="does not fit on cpu as a whole"):
        gradient(run_of(model))


def test_settings_out_of_range_are_refused(vae):
    run = run_of(unet(0))
    for settings, message in (
        ({"sampler": "euler_ancestral"}, "through the sampler euler_ancestral; use euler, ddim, dpmpp_2m"),
        ({"last_steps": 4}, "last_steps 4 is not in 1 to 3"),
        ({"last_steps": 0}, "last_steps 0"),
    ):
        with pytest.raises(ValueError, match=message):
            session(run, lambda s: None, **settings)
    with pytest.raises(ValueError, match="ddim fills what is kept with noise of its own"):
        session(run_of(unet(0), content(mask=True)), lambda s: None, sampler="ddim")
    with pytest.raises(ValueError, match="late 4 is not in 1 to 3"):
        session(run, lambda s: s.generate(run.noise_of(1), 4))
    with pytest.raises(ValueError, match="without a vae"):
        session(run, lambda s: s.decode(torch.zeros(1, 4, 16, 16)))


def test_a_video_vae_and_an_encoder_of_any_size_are_refused(vae, monkeypatch):
    monkeypatch.setattr(vae, "latent_dim", 3)
    with pytest.raises(ValueError, match="decodes video or sound"):
        session(run_of(unet(0)), lambda s: None, vae=vae)
    encoder = tiny_encoder()
    encoder.image_size = -1
    with pytest.raises(ValueError, match="pictures of any size"):
        session(run_of(unet(0)), lambda s: None, clip_vision=encoder)


# the recorder alone


def inplace(x):
    y = x * 2
    z = y.sin()
    y += 1  # y has not been saved by sin, z's backward needs it as it was
    y *= z
    z += y
    return z


def test_changes_in_place_keep_the_gradient_right():
    x = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    for checkpoint in (True, False):
        recorder = Recorder(checkpoint)
        with recorder.recording():
            assert torch.autograd.gradcheck(lambda x, r=recorder: r("test", inplace, x), x)


def test_what_is_changed_in_place_and_saved_again_counts_twice():
    def twice(x):
        y = x * 1
        a = y.sin()
        y += 1
        return a + y.sin()

    recorder = Recorder()
    recorder("test", twice, torch.rand(1000, requires_grad=True))
    assert recorder.sizes["test"] == 2 * 4000
