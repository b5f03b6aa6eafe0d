"""Gradients from the final latent to the noise through ComfyUI's sampling, and the state of the models afterwards."""

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
from chorus.tests.families.catalogue import FAMILIES
from chorus.tests.support.gradients import (
    direction_of,
    finite_difference,
    gradient,
    loss_of,
    seed_sampler,
    session,
    tiny_encoder,
    with_easycache,
)
from chorus.tests.support.head_training import Scaled
from chorus.tests.support.lifecycle import check_unchanged, interrupt_at
from chorus.tests.support.seeds import WORDS, content, limit_free_memory, with_control
from chorus.tests.support.tiers import covering, quick
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
    """WORDS with hooks that add a LoRA to all attention layers.

    ``positive`` and ``negative`` select the conditionings with hooks. ``keyframes`` are strengths, half a run apart.
    """
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
    selected = positive, negative
    pairs = zip(WORDS, selected, strict=True)
    return [comfy.hooks.set_hooks_for_conditioning(w, hooks) if s else w for w, s in pairs]


def left_half():
    """Mask [1, 16, 16] that is 1 in the left half."""
    return (torch.arange(16) < 8).float().expand(1, 16, 16).clone()


def soft():
    """Soft blend with wide transitions.

    With narrow transitions, the loss is not linear over the smallest step that float32 allows for a finite difference.
    """
    return blend(unet(0), unet(1), *EXPERT_WORDS, mask_mode="soft", softness=4.0)[0]


def forced():
    """Hard blend with a forced mask. A mask that depends on the noise would make the loss discontinuous."""
    return blend(unet(0), lora(unet(1), 2), *EXPERT_WORDS, region=left_half(), region_mode="force")[0]


CASES = {
    "eps": lambda: seed_sampler(unet(0)),
    "v": lambda: seed_sampler(unet(1, "v")),
    "flow": lambda: seed_sampler(unet(2, "flow")),
    "flux": lambda: seed_sampler(flux(3)),
    "lora": lambda: seed_sampler(lora(unet(0), 1, strength=0.3)),
    "soft blend": lambda: seed_sampler(soft()),
    "hard blend": lambda: seed_sampler(forced()),
    "hooks": lambda: seed_sampler(unet(0), words=hooked(unet(0))),
    "mask": lambda: seed_sampler(unet(0), content(mask=True), denoise=0.6),
    "x0": lambda: seed_sampler(as_x0(unet(1))),
    "demo": lambda: demo_run(),
}


@in_inference_mode
def as_x0(model):
    return comfy_extras.nodes_model_advanced.ModelSamplingDiscrete().patch(model, "x0", False)[0]


def demo_run(**settings):
    with torch.inference_mode():
        model, clip, _ = modules.load_checkpoint("general")
        words = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat", "")]
        return seed_sampler(model, latent(channels=8), words, cfg=4.0, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradient_equals_finite_differences(case):
    run = CASES[case]()
    _, found = gradient(run, late=2)
    direction = direction_of(found)
    expected = finite_difference(run, direction, late=2)
    # the derivative along the random direction is not negligible, so a missing part of the gradient is detected
    assert abs(expected) > 0.01 * float(found.norm())
    assert float((found * direction).sum()) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("sampler", comfy_session.STEPPERS)
def test_gradient_of_every_sampler_equals_finite_differences(sampler):
    run = seed_sampler(unet(0), content(mask=sampler != "ddim"))
    _, found = gradient(run, sampler=sampler, seed=4)
    direction = direction_of(found)
    expected = finite_difference(run, direction, sampler=sampler, seed=4)
    assert float((found * direction).sum()) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("case", quick(["v", "flux", "hooks", "mask"], [c for c in CASES if c != "demo"]))
def test_checkpointing_changes_gradients_only_by_rounding(case):
    run = CASES[case]()
    (loss, found), (plain_loss, plain) = gradient(run, late=3), gradient(run, late=3, checkpoint=False)
    assert torch.equal(loss, plain_loss)
    assert (found - plain).norm() < 1e-5 * plain.norm()


@covering(kind=["eps", "v", "flow"], sampler=[*comfy_session.STEPPERS], mask={"whole": False, "masked": True})
def test_session_equals_ksampler_bit_for_bit(kind, sampler, mask):
    if sampler == "ddim" and mask:
        pytest.skip("a session rejects ddim with a noise mask")
    model = unet(2, kind)
    run = seed_sampler(model, content(mask), denoise=0.7, sampler_name=sampler)

    def work(s):
        z = run.noise_of(5).requires_grad_(True)
        return s.to_latent(s.generate(z)[-1]).detach()

    expected = ksample(model, *WORDS, content(mask), sampler=sampler, denoise=0.7, seed=5)
    assert torch.equal(session(run, work, sampler=sampler, seed=5), expected)
    assert torch.equal(session(run, work, sampler=sampler, seed=5, gradients=False), expected)


def test_session_of_flux_equals_ksampler_to_rounding():
    """While ``in_training`` is set, ComfyUI uses another kernel for the rotary embedding, which rounds differently."""
    model = flux(3)
    run = seed_sampler(model)
    found = session(run, lambda s: s.to_latent(s.generate(run.noise_of(5).requires_grad_(True))[-1]).detach())
    expected = ksample(model, *WORDS, latent(channels=16), seed=5)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_late_latents_are_vp_scaled_for_eps_and_x0_estimates_for_flow():
    for kind in ("eps", "flow"):
        model, calls = recording(unet(2, kind))
        run = seed_sampler(model)
        late = session(run, lambda s, run=run: s.generate(run.noise_of(3), 3), gradients=False)
        sigmas = run.sigmas()
        for k in (0, 1):
            expected = calls[k].denoised
            if kind == "eps":
                expected = calls[k + 1].x / (1 + sigmas[k + 1] ** 2) ** 0.5
            assert torch.allclose(late[k], expected, rtol=1e-5, atol=1e-6)
        assert torch.allclose(late[2], calls[2].denoised, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last_steps", [1, 2])
def test_last_steps_treats_earlier_x0_estimates_as_constant(last_steps):
    run = seed_sampler(unet(0))
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


class SavedActivations:
    """Counts the bytes of the tensors that autograd saves, except the weights of ``modules``."""

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


def saved_bytes(steps, checkpoint):
    """(bytes saved by the forward pass of a run, bytes of one step measured by the recorder)."""
    run, out = seed_sampler(unet(0)), {}

    def work(s):
        out["recorder"], saved = s._recorder, SavedActivations()
        # with these hooks, autograd also accepts ComfyUI's in-place additions to saved tensors
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            z = run.noise_of(3).requires_grad_(True)
            loss = loss_of(s.generate(z))
        del loss
        return saved.total

    return session(run, work, steps=steps, checkpoint=checkpoint), out["recorder"].sizes["denoiser"]


@pytest.mark.slow
def test_saved_activations_do_not_grow_with_the_steps():
    """Each step adds only two latents: its input, and values of its output to compare with the recomputed output."""
    one = 4 * 16 * 16 * 4  # bytes of one latent
    (few, step), (many, same) = saved_bytes(2, True), saved_bytes(8, True)
    assert step == same
    assert step > 50 * one
    assert many - few <= 6 * 2.1 * one
    (few, _), (many, _) = saved_bytes(2, False), saved_bytes(8, False)
    assert many > 3 * few
    assert few > step  # autograd saves more for two steps than the measured size of one step


def test_measured_size_equals_saved_activations():
    run, sizes = seed_sampler(unet(0)), {}

    def work(s):
        saved = SavedActivations(s._guider.inner_model)
        x = s.start(run.noise_of(3)).requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            s.denoise(x, s.sigmas[0])
        sizes["saved"], sizes["measured"] = saved.total, s._recorder.sizes["denoiser"]

    session(run, work, checkpoint=False)
    assert sizes["measured"] == pytest.approx(sizes["saved"], rel=0.02)


def test_forward_and_recomputed_rows_are_counted():
    run = seed_sampler(soft())
    gradient(run)
    per_call = 2 * 2  # two models; guidance doubles the rows
    assert run.counter.recomputed == 3 * per_call
    assert run.counter.compared == 3 * per_call  # once in a session
    assert run.counter.rows == (2 * 3 + 3) * per_call


@pytest.mark.slow
def test_gradients_of_a_batch_equal_those_of_its_samples():
    run = seed_sampler(forced())

    def work(s):
        z = torch.cat([run.noise_of(k) for k in (3, 4)]).requires_grad_(True)
        loss_of(s.generate(z)).backward()
        return z.grad * 2  # the loss is a mean over two samples

    both = session(run, work)
    for k in range(2):
        assert torch.allclose(both[k : k + 1], gradient(run, seed=3 + k)[1], rtol=1e-5)


def test_noise_of_inverts_start_and_to_latent_inverts_to_model():
    for kind in ("eps", "v", "flow"):
        run = seed_sampler(unet(2, kind), content(), denoise=0.6)

        def work(s, run=run, kind=kind):
            z = run.noise_of(1)
            assert torch.allclose(s.noise_of(s.start(z)), z, atol=1e-5)
            latents = content()["samples"]
            assert torch.allclose(s.to_latent(s.to_model(latents)), latents, atol=1e-6)
            assert s.flow == (kind == "flow")

        session(run, work, gradients=False)


def test_denoise_equals_the_guided_predictions_of_a_run():
    model, calls = recording(unet(0))
    ksample(model, *WORDS, latent(), seed=1)
    recorded = [(c.x.clone(), c.sigma.clone(), c.denoised.clone()) for c in calls]
    run = seed_sampler(model, content(mask=True))  # denoise() does not apply the mask

    def work(s):
        for x, sigma, denoised in recorded:
            assert torch.equal(s.denoise(x, sigma), denoised)
            assert torch.equal(s.denoise(torch.cat([x, x]), float(sigma))[1:], denoised)

    session(run, work, gradients=False)
    other = session(seed_sampler(model), lambda s: s.denoise(*recorded[0][:2]), gradients=False, cfg=1.0)
    assert not torch.equal(other, recorded[0][2])


# state after a session


def plain(model):
    return ksample(model, *WORDS, latent(), seed=1)


def related_models():
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


@pytest.mark.slow
@pytest.mark.parametrize("end", ["finished", "interrupted", "failed"])
@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpointed", "plain"])
def test_models_sample_the_same_before_and_after_a_session(end, checkpoint):
    models = related_models()
    before = {name: plain(m) for name, m in models.items()}
    blended, trace = blend_of(models)
    expected = plain(blended)
    record, weights = trace.record, [p.clone() for p in unpatched(models["base"])]
    if end == "finished":
        gradient(seed_sampler(blended), checkpoint=checkpoint)
    elif end == "interrupted":
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            # The first call is followed by two calls for the comparison of its gradient. Masks flip between these
            # calls, so the comparison is undecided.
            gradient(seed_sampler(interrupt_at(blended, 7 if checkpoint else 5)), checkpoint=checkpoint)
    else:
        with pytest.raises(RuntimeError, match="a loss that fails"):
            session(seed_sampler(blended), fail, checkpoint=checkpoint)
    assert not comfy.model_management.in_training
    assert not torch.is_inference_mode_enabled()
    assert trace.record is record
    check_unchanged(models)
    assert all(torch.equal(p, q) for p, q in zip(unpatched(models["base"]), weights, strict=True))
    for name, model in models.items():
        assert not model.model.diffusion_model._forward_pre_hooks
        assert torch.equal(plain(model), before[name])
    assert torch.equal(plain(blended), expected)


def test_in_training_is_set_in_a_session_and_restored_afterwards(monkeypatch):
    seen = []
    session(
        seed_sampler(unet(0)),
        lambda s: seen.append((comfy.model_management.in_training, torch.is_inference_mode_enabled())),
    )
    assert seen == [(True, False)]
    monkeypatch.setattr(comfy.model_management, "in_training", True)  # as inside a training node
    session(seed_sampler(unet(0)), lambda s: None)
    assert comfy.model_management.in_training


@pytest.mark.slow
def test_model_copies_share_weights_and_are_freed_after_the_session():
    run, copies = seed_sampler(unet(0)), []

    def work(s):
        copy, original = (dict(m.named_parameters()) for m in (s._guider.inner_model, run.model.model))
        assert not any(p.is_inference() or p.requires_grad for p in copy.values())
        assert all(p.is_inference() and p.data_ptr() == copy[name].data_ptr() for name, p in original.items())
        copies.append(weakref.ref(s._guider.inner_model))
        loss_of(s.generate(run.noise_of(3).requires_grad_(True))).backward()

    session(run, work)
    gc.collect()
    assert copies[0]() is None


def test_patched_weights_do_not_count_as_activations():
    sizes = []
    for model in (unet(0), lora(unet(0), 1)):
        run = seed_sampler(model)

        def work(s, run=run):
            s.generate(run.noise_of(3).requires_grad_(True))
            return s._recorder.sizes["denoiser"]

        sizes.append(session(run, work))
    assert sizes[0] == sizes[1]


def test_weights_made_outside_inference_mode_are_not_copied():
    with torch.inference_mode(False):
        model = unet.__wrapped__(0)
    model.model.requires_grad_(False)
    run = seed_sampler(model)
    assert session(run, lambda s: s._guider.inner_model is model.model)
    _, found = gradient(run)
    assert torch.equal(found, gradient(seed_sampler(unet(0)))[1])


def test_shared_checkpoint_is_copied_once():
    base = unet(0)
    run = seed_sampler(blend(base, base, *EXPERT_WORDS)[0])

    def work(s):
        chain = blend_chain(s._guider.model_patcher)
        return chain.experts[0].patcher.model is s._guider.inner_model is not base.model

    assert session(run, work)


# images


ENCODERS = {
    "clip": tiny_encoder,
    "siglip": lambda: tiny_encoder("siglip_vision_model"),
    "demo": modules.load_vision,
}


@covering(name=[*ENCODERS], size=[(64, 64), (48, 80), (32, 32)])
def test_embeddings_equal_encode_image(name, size):
    with torch.inference_mode():
        encoder = ENCODERS[name]()
        image = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(1)) * 1.1
        for crop in (True, False):
            expected = encoder.encode_image(image, crop=crop)["image_embeds"]
            expected = expected.mean(1) if expected.ndim == 3 else expected
            run = seed_sampler(unet(0))
            for gradients in (True, False):
                found = session(
                    run,
                    lambda s, c=crop, g=gradients: s.embed(image.clone().requires_grad_(g), c).detach(),
                    gradients=gradients,
                    clip_vision=encoder,
                )
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
            separate = [encoder.encode_image(image[k : k + 1], crop=crop)["image_embeds"] for k in range(2)]
            if expected.shape == separate[0].shape[:1] * 2 + separate[0].shape[1:]:
                assert torch.equal(found, torch.cat(separate))


@pytest.mark.parametrize("name", ENCODERS)
def test_gradient_ignores_the_rounding_of_pixels(name):
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
        with torch.no_grad():
            # in the pixels with large gradients, the step is larger than the rounding to 8 bits
            h = 0.5
            return float(x.grad.norm()), float(f(image + h * direction) - f(image - h * direction)) / (2 * h)

    found, expected = session(seed_sampler(unet(0)), work, clip_vision=encoder)
    assert found > 1e-4
    assert found == pytest.approx(expected, rel=0.15)


@in_inference_mode
def taesd():
    weights = comfy.taesd.taesd.TAESD().state_dict()
    generator = torch.Generator().manual_seed(1)
    for w in weights.values():
        if w.ndim > 0:  # vae_scale and vae_shift are scalars
            w.copy_(torch.randn(w.shape, generator=generator) * w[0].numel() ** -0.5 * (w.ndim > 1))
    return comfy.sd.VAE(sd=weights)


VAES = {"demo": (lambda: modules.load_checkpoint("general")[2], 8), "taesd": (taesd, 4)}


def sampler_with(channels):
    """A run of a model whose latents have 4 or 8 ``channels``, as those of a VAE."""
    return seed_sampler(unet(0) if channels == 4 else unet(0, latent_format=Scaled))


@pytest.mark.parametrize("name", VAES)
def test_session_decodes_the_same_images_as_the_vae(name):
    make, channels = VAES[name]
    latents = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        vae = make()
        expected = torch.cat([vae.decode(z) for z in latents.split(1)])
    for gradients in (True, False):
        work = lambda s, g=gradients: s.decode(latents.clone().requires_grad_(g)).detach()  # noqa: E731
        assert torch.equal(session(sampler_with(channels), work, gradients=gradients, vae=vae), expected)


@covering(name=[*VAES], checkpoint={"checkpointed": True, "plain": False})
def test_gradient_of_decoding_equals_finite_differences(name, checkpoint):
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
            # the step is along the gradient: in other directions, the kinks of ReLU and clipping cause an error that is
            # as large as the derivative
            direction, h = z.grad / z.grad.norm(), 0.03
            return float(z.grad.norm()), float(f(z + h * direction) - f(z - h * direction)) / (2 * h)

    found, expected = session(sampler_with(channels), work, vae=vae, checkpoint=checkpoint)
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpointed", "plain"])
def test_optimising_noise_by_the_embedding_lowers_the_score(vae, checkpoint):
    """With demo models, the gradient flows through the image encoder, the VAE and two sampling steps to the noise."""
    run = demo_run()
    with torch.inference_mode():
        encoder = modules.load_vision()

    def work(s):
        with torch.no_grad():
            target = normalize(s.embed(s.decode(s.to_latent(s.generate(run.noise_of(8))[-1]))), dim=-1)
        z, scores = run.noise_of(1).requires_grad_(True), []
        adam = torch.optim.Adam([z], lr=0.02)
        for _ in range(4):
            adam.zero_grad()
            embeds = s.embed(s.decode(s.to_latent(s.generate(z)[-1])))
            loss = 1 - (normalize(embeds, dim=-1) * target).sum()
            loss.backward()
            adam.step()
            scores.append(float(loss))
        return scores

    scores = session(run, work, steps=2, vae=vae, clip_vision=encoder, checkpoint=checkpoint)
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.9 * scores[0]


# errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: seed_sampler(unet(0), words=with_control(WORDS)), "carries a ControlNet"),
        (lambda: seed_sampler(blend(unet(0), unet(1), *with_control(EXPERT_WORDS))[0]), "carries a ControlNet"),
        (lambda: seed_sampler(unet(0), words=hooked(unet(0), negative=False)), "hooks change the weights within a run"),
        (lambda: seed_sampler(unet(0), words=hooked(unet(0), keyframes=(1.0, 0.5))), "without keyframes"),
        (lambda: seed_sampler(blend(unet(0), unet(1), hooked(unet(1))[0])[0]), "hooks change the weights within a run"),
        (lambda: seed_sampler(with_easycache(unet(0))), "EasyCache"),
        (lambda: seed_sampler(blend(unet(0), with_easycache(unet(1)))[0]), "EasyCache"),
        (
            lambda: seed_sampler(blend(unet(0), unet(1), refresh=3, label="emoji")[0]),
            "refresh 3 of the expert 'emoji'.*to 1",
        ),
        (lambda: seed_sampler(blend(unet(0), unet(1), skip_below=0.1)[0]), r"skip_below 0\.1"),
        (lambda: seed_sampler(blend(unet(0), unet(1), crop_margin=2)[0]), "crop_margin 2"),
    ],
    ids="control expert-control hooks keyframes expert-hooks easycache expert-easycache refresh skip crop".split(),
)
def test_inputs_without_a_gradient_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        gradient(make())


def test_models_without_a_derivative_rejected(monkeypatch):
    model = unet(0)
    monkeypatch.setattr(comfy.model_base, "Anima", type(model.model))
    with pytest.raises(ValueError, match=r"BaseModel computes its rotary embedding.*mode search"):
        gradient(seed_sampler(model))


def with_patch(change):
    """Sampler of a model with a patch that applies ``change`` to the guided predictions."""
    model = unet(0).clone()
    model.set_model_sampler_post_cfg_function(lambda a: change(a["denoised"]))
    return seed_sampler(model)


def test_random_patch_detected():
    with pytest.raises(ValueError, match=r"returned another result .* is random or depends on earlier steps"):
        gradient(with_patch(lambda x: x * (1 + 0.1 * torch.randn_like(x))))


def test_detaching_patch_detected():
    for checkpoint in (True, False):
        with pytest.raises(ValueError, match="no gradient flows through the denoiser"):
            gradient(with_patch(lambda x: x.detach()), checkpoint=checkpoint)


def test_gradient_too_large_for_memory_rejected_with_its_size(monkeypatch):
    limit_free_memory(2**20, monkeypatch)
    with pytest.raises(
        MemoryError,
        match=r"gradient of the denoiser needs .* GiB on cpu \(measured\), 0.00 GiB are free; set cfg to 1 \(needs",
    ):
        gradient(seed_sampler(unet(0)))
    with pytest.raises(MemoryError, match="switch checkpointing on, lower last_steps, set cfg to 1"):
        gradient(seed_sampler(unet(0)), checkpoint=False)
    with pytest.raises(MemoryError, match="free; use a smaller latent_image"):
        gradient(seed_sampler(unet(0), cfg=1.0))


def test_vae_gradient_too_large_for_memory_rejected(vae, monkeypatch):
    def decode(s):
        with monkeypatch.context() as patch:
            limit_free_memory(1000, patch)
            s.decode(torch.zeros(1, 8, 16, 16, requires_grad=True))

    with pytest.raises(MemoryError, match="gradient of the VAE needs"):
        session(sampler_with(8), decode, vae=vae)


def test_non_finite_output_rejected():
    with pytest.raises(ValueError, match="denoiser is not finite"):
        gradient(with_patch(lambda x: x * float("nan")))


def test_partially_loaded_model_rejected(monkeypatch):
    model = unet(0)
    copied = autograd_copies._copied_module

    def copy_partially_loaded(patcher):
        override = copied(patcher)
        override[0].__class__ = type(
            "PartlyLoaded", (type(override[0]),), {"model_lowvram": property(lambda s: True, lambda s, v: None)}
        )
        return override

    monkeypatch.setattr(autograd_copies, "_copied_module", copy_partially_loaded)
    with pytest.raises(MemoryError, match=r"needs all weights of .* on cpu, and they do not fit"):
        gradient(seed_sampler(model))


def test_settings_out_of_range_rejected(vae):
    run = seed_sampler(unet(0))
    for settings, message in (
        (
            {"sampler": "euler_ancestral"},
            "the sampler euler_ancestral has no gradient; use one of euler, ddim, dpmpp_2m",
        ),
        ({"last_steps": 4}, "last_steps 4 is not between 1 and 3"),
        ({"last_steps": 0}, "last_steps 0"),
    ):
        with pytest.raises(ValueError, match=message):
            session(run, lambda s: None, **settings)
    with pytest.raises(ValueError, match="ddim fills the unmasked area with random noise"):
        session(seed_sampler(unet(0), content(mask=True)), lambda s: None, sampler="ddim")
    with pytest.raises(ValueError, match="late 4 is not between 1 and 3"):
        session(run, lambda s: s.generate(run.noise_of(1), 4))
    with pytest.raises(ValueError, match="session has no vae"):
        session(run, lambda s: s.decode(torch.zeros(1, 4, 16, 16)))


def test_video_vae_and_encoder_without_a_fixed_image_size_rejected(vae, monkeypatch):
    monkeypatch.setattr(vae, "latent_dim", 3)
    with pytest.raises(ValueError, match=r"decodes latents of 5 axes .*, the model samples 1x4x16x16"):
        session(seed_sampler(unet(0)), lambda s: None, vae=vae)
    encoder = tiny_encoder()
    encoder.image_size = -1
    with pytest.raises(ValueError, match="images of any size"):
        session(seed_sampler(unet(0)), lambda s: None, clip_vision=encoder)


# the recorder without a model


def inplace(x):
    y = x * 2
    z = y.sin()
    y += 1  # sin saves its input y: the backward pass of z needs the value from before this addition
    y *= z
    z += y
    return z


def test_gradient_is_correct_with_in_place_operations():
    x = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    for checkpoint in (True, False):
        recorder = Recorder(checkpoint)
        with recorder.recording():
            assert torch.autograd.gradcheck(lambda x, r=recorder: r("test", inplace, x), x)


def test_tensor_changed_in_place_and_saved_again_counts_twice():
    def twice(x):
        y = x * 1
        a = y.sin()
        y += 1
        return a + y.sin()

    recorder = Recorder()
    recorder("test", twice, torch.rand(1000, requires_grad=True))
    assert recorder.sizes["test"] == 2 * 4000


class TestKernelWithoutDerivative:
    """A network whose rotary embedding is a fused kernel has no gradient; it is rejected by name."""

    def test_known_model_rejected_before_the_run(self):
        family = FAMILIES["ErnieImage"]
        run = seed_sampler(family.model(), family.latent(), family.prompts())
        with pytest.raises(
            ValueError, match=r"ErnieImage computes its rotary embedding with a kernel .* use mode search"
        ):
            gradient(run)

    def test_unknown_model_rejected_by_name(self, monkeypatch):
        monkeypatch.setattr(comfy_differentiable, "NO_DERIVATIVE", ())
        family = FAMILIES["ErnieImage"]
        run = seed_sampler(family.model(), family.latent(), family.prompts())
        with pytest.raises(ValueError, match=r"an operation of ErnieImage has no derivative .* use mode search"):
            gradient(run)
        assert not comfy.model_management.in_training
