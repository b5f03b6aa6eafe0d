"""The cells of a family in docs/compatibility.md.

Each cell checks one feature of the pack with the family's small models, against an independent computation.
"""

import gc
from collections.abc import Callable, Iterator
from itertools import pairwise
from unittest import mock

import comfy.model_sampling
import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import numpy as np
import torch

from chorus.host.latent_spaces import LatentSpace
from chorus.techniques.saliency_blend.comfy_expert_run import ExpertRun
from chorus.techniques.seed_select.comfy_sampler import ComfySeedSampler
from chorus.tests.families.catalogue import FAMILIES, NOT_BUILT
from chorus.tests.families.family import Family
from chorus.tests.families.outcome import NotBuilt, Outcome, one_line, outcome_of
from chorus.tests.families.tiny_vae import tiny_vae
from chorus.tests.support.blend_definition import definition
from chorus.tests.support.gradients import direction_of, finite_difference, gradient, seed_sampler
from chorus.tests.support.heads import apply_head, head_for
from chorus.tests.support.tiny_models import (
    Call,
    blend,
    defaults,
    in_inference_mode,
    ksample,
    predictions,
    recording,
)

CFG, STEPS = 4.0, 2
IMAGE_TO_IMAGE = ("LotusD", "WAN21_FlowRVS")  # do not start from noise
SAMPLING = dict(steps=STEPS, cfg=CFG, scheduler="simple")
STRENGTH = 40.0  # so that the scores do not tie where the saliency is flat, as at the highest noise levels
BATCH_ROUNDING = 3e-5  # relative, between batches of different sizes, for which torch can choose other kernels
SHARED_ROUNDING = 1e-4  # relative, of a run that continues in the middle
ROUNDING = 1e-5  # relative, of the latents after two steps in float32


def parts(samples):
    """The parts of a latent, or of a list of its parts."""
    if isinstance(samples, list):
        return samples
    return samples.unbind() if samples.is_nested else [samples]


def distance(a, b):
    """Largest relative difference of the parts of two latents."""
    return max(float((x - y).norm() / y.norm()) for x, y in zip(parts(a), parts(b), strict=True))


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def positions(samples):
    """Height and width of a latent, for masks."""
    return parts(samples["samples"])[0].shape[-2:]


class Models:
    """The small models of one family and their prompts, made when they are first used."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.base, self.expert = family.model(0), family.model(1)
        self.prompts, self.expert_prompts = family.prompts(10), family.prompts(30)
        self._plain = None

    @property
    def plain(self):
        """Samples of the base alone."""
        if self._plain is None:
            self._plain = self.sample(self.base)
        return self._plain

    def sample(self, model, prompts=None, **changed):
        return ksample(model, *(prompts or self.prompts), self.family.latent(), **{**SAMPLING, **changed})


def blended_equals_definition(models):
    check_definition(models, models.expert, models.expert_prompts)


def check_definition(models, expert, expert_prompts):
    """Compare masks and predictions of a run with the definition, from the predictions of each model alone.

    Of a latent with several parts, the definition holds for the first (the video), and the others are the base's.
    """
    strengths = dict(general_strength=STRENGTH, expert_strength=STRENGTH)
    blended, trace = blend(models.base, expert, *expert_prompts, **strengths)
    blended, calls = recording(blended)
    models.sample(blended)
    shapes = [part.shape for part in parts(models.family.latent()["samples"])]
    alone = [
        predictions(models.base, *models.prompts, calls, shapes=shapes),
        predictions(expert, *expert_prompts, calls, conversion(models.base, expert), shapes),
    ]
    assert len(calls) == len(trace.record.steps) == STEPS
    for call, base in zip(calls, alone[0], strict=True):
        for ours, cond, uncond in list(zip(*(unpacked(t, shapes) for t in (call.denoised, *pair(base))), strict=True))[
            1:
        ]:
            error = float((ours - uncond - CFG * (cond - uncond)).norm() / ours.norm())
            assert error < ROUNDING, f"another part than the first differs from the base's by {error:.2g}"
    calls, *alone = ([of_first_part(call, shapes) for call in found] for found in (calls, *alone))
    for index, call in enumerate(calls):
        expected = definition(
            by_frames(call), [pair(by_frames(a[index])) for a in alone], strengths=[STRENGTH] * 2, guidance=[CFG] * 2
        )
        certain = expected.certain
        assert certain.mean() > 0.9, "the scores tie"
        shares = trace.record.shares(index).double().numpy().reshape(expected.weights.shape)
        wrong = (np.abs(shares - expected.weights) > 0)[:, certain].any(0).mean()
        assert not wrong, f"step {index}: {wrong:.0%} of the mask differs from the definition"
        error = np.abs(by_frames(call).denoised.double().numpy() - expected.guided)
        scale = np.abs(expected.guided).max() * ROUNDING
        worst = (error / (expected.bound + scale)).swapaxes(0, 1)[:, certain].max()
        assert worst <= 1.0, f"step {index}: x0 differs from the definition by {worst:.3g} times its bound"


def pair(call):
    return call.cond, call.uncond


def unpacked(packed, shapes):
    """The parts of a latent that ComfyUI packs into one tensor [B, 1, N] if there are several."""
    return comfy.utils.unpack_latents(packed, shapes)


def of_first_part(call, shapes):
    """``call`` with the first part of each latent; that of audio [B, C, L] as an image of one row."""
    tensors = (unpacked(t, shapes)[0] for t in (call.x, call.cond, call.uncond, call.denoised))
    x, cond, uncond, denoised = (t.unsqueeze(2) if t.ndim == 3 else t for t in tensors)
    return Call(x, call.sigma, cond, uncond, denoised)


def by_frames(call):
    """``call`` with the frames of a video [B, C, T, H, W] as separate images [B T, C, H, W]."""
    if call.x.ndim == 4:
        return call
    frames = call.x.shape[2]

    def fold(x):
        return x.movedim(2, 1).flatten(0, 1)

    sigma = call.sigma.repeat_interleave(frames)
    return Call(fold(call.x), sigma, fold(call.cond), fold(call.uncond), fold(call.denoised))


def conversion(base, expert):
    """Function from (x, sigma) in the base's noise process to (x, sigma) in the expert's, with equal ratio of noise to
    signal."""
    samplings = [model.get_model_object("model_sampling") for model in (base, expert)]
    flows = [isinstance(sampling, comfy.model_sampling.CONST) for sampling in samplings]
    scales = [getattr(s, "noise_scale", 1.0) if flow else 1.0 for s, flow in zip(samplings, flows, strict=True)]
    if flows[0] == flows[1] and scales[0] == scales[1]:
        return lambda x, sigma: (x, sigma)

    def amplitudes(flow, scale, sigma):
        return (1 - sigma, sigma * scale) if flow else (1.0, sigma)

    def convert(x, sigma):
        signal, noise = amplitudes(flows[0], scales[0], float(sigma[0]))
        ratio = noise / signal if signal else float("inf")
        if flows[1]:
            theirs = 1.0 if ratio == float("inf") else ratio / (scales[1] + ratio)
        else:
            theirs = min(ratio, float(samplings[1].sigma_max))
        target = amplitudes(flows[1], scales[1], theirs)
        return x * (np.hypot(*target) / np.hypot(signal, noise)), torch.full_like(sigma, theirs)

    return convert


def expert_everywhere(models):
    """With the expert forced everywhere, the samples are those of the expert alone with its prompts.

    The second run is at cfg 1. Its second step uses the mask of the first, so that it needs only the expert's positive.
    Of a latent with several parts only the first is the expert's, and it depends on the others: these have one step.
    """
    latent = models.family.latent()
    several = len(parts(latent["samples"])) > 1
    everywhere = torch.ones(1, *positions(latent))
    inputs = dict(region=everywhere, region_mode="force")
    for cfg, refresh, bound in ((CFG, 1, ROUNDING), (1.0, STEPS, BATCH_ROUNDING)):
        sampling = dict(cfg=cfg, steps=1 if several else STEPS)
        blended, _ = blend(models.base, models.expert, *models.expert_prompts, **inputs, mask_refresh=refresh)
        found, base = models.sample(blended, **sampling), models.sample(models.base, **sampling)
        expected = models.sample(models.expert, models.expert_prompts, **sampling)
        error = distance(found, of_both(expected, base))
        assert error < bound, f"differs from the expert alone by {error:.2g} at cfg {cfg:g}"


def of_both(first, others):
    """A list of the parts of latents: the first part of one latent, and the other parts of another."""
    return [parts(first)[0], *parts(others)[1:]]


def same_checkpoint(models):
    """A blend whose expert has the base's weights and other prompts equals sampling with each prompt alone.

    The blend runs twice: with the predictions of both prompts in one batch, and in separate batches.
    """
    height, width = positions(models.family.latent())
    half = torch.zeros(1, height, width)
    half[..., : width // 2] = 1.0
    blended, _ = blend(models.base, models.base, *models.expert_prompts, region=half, region_mode="force")
    together = models.sample(blended, steps=1)
    with mock.patch.object(ExpertRun, "shares_forward_with", return_value=False):
        apart = models.sample(blended, steps=1)
    ours, theirs = (models.sample(models.base, p, steps=1) for p in (models.prompts, models.expert_prompts))
    expected = of_both(torch.where(half.bool(), parts(theirs)[0], parts(ours)[0]), ours)
    together, apart = distance(together, expected), distance(apart, expected)
    assert apart < ROUNDING, f"with separate batches, differs from the two prompts alone by {apart:.2g}"
    assert together < BATCH_ROUNDING, f"with one batch, differs from the two prompts alone by {together:.2g}"


def neutral(models):
    """With strength 0 or an empty region, the samples have the same bits as those of the base alone."""
    empty = torch.zeros(1, *positions(models.family.latent()))
    for name, inputs in (("strength 0", dict(expert_strength=0.0)), ("an empty region", dict(region=empty))):
        blended, _ = blend(models.base, models.expert, *models.expert_prompts, **inputs)
        assert same_bits(models.sample(blended), models.plain), f"{name} changes the samples"


def partners(family):
    """Names of the other families with the same latent space, without image-to-image models.

    The families that follow ``family`` in the catalogue come first.
    """

    def space(other):
        return LatentSpace.of(FAMILIES[other].latent_format())

    group = [name for name in FAMILIES if space(name) == space(family.name)]
    index = group.index(family.name)
    others = [*group[index + 1 :], *group[:index]]
    return [name for name in others if FAMILIES[name].class_name not in (family.class_name, *IMAGE_TO_IMAGE)]


def latent_spaces() -> dict[str, list[str]]:
    """The families of each latent space, without those whose blend is refused whatever the expert is."""
    found: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        if family.class_name not in IMAGE_TO_IMAGE:
            found.setdefault(str(LatentSpace.of(family.latent_format())), []).append(name)
    return found


def other_family(models):
    """A blend with an expert of another family with the same latent space equals the definition."""
    if not (names := partners(models.family)):
        raise NotBuilt("no other family has this latent space")
    for name in names:
        other = FAMILIES[name]
        expert, prompts = other.model(1), other.prompts(30)
        try:
            ksample(expert, *prompts, models.family.latent(), **SAMPLING)
        except Exception as error:
            reason = f"{name} alone cannot sample this latent: {one_line(error)}"
            continue
        return check_definition(models, expert, prompts)
    raise NotBuilt(reason)


@in_inference_mode
def seed_search(models):
    """KSampler generates the same samples from the best seed of SeedSelect's search, bit for bit."""
    from chorus.nodes.seed_select import SeedSelect

    samples = models.family.latent()
    height, width = positions(samples)
    first = parts(samples["samples"])[0]
    video = models.family.latent_format().latent_dimensions == 3
    inputs = dict(
        candidates=2,
        first_steps=1,
        survivors=0.5,
        semantic_weight=0.0,
        references=torch.rand(2, 8 * height, 8 * width, 3, generator=torch.Generator().manual_seed(4)),
        vae=tiny_vae(first.shape[1], video=video),
    )
    positive, negative = models.prompts
    wired = dict(model=models.base, positive=positive, negative=negative, latent_image=samples)
    sampling = {**SAMPLING, "denoise": 1.0, "sampler_name": "euler"}
    found = SeedSelect.execute(**{**defaults(SeedSelect), **wired, **inputs, **sampling}).args
    seed, chosen = found[1], found[2]["samples"]
    assert same_bits(chosen, models.sample(models.base, seed=seed)), (
        "KSampler generates other samples from the best seed"
    )
    run = seed_sampler(models.base, samples, models.prompts, **{**SAMPLING, "steps": 1})
    if run.batch_size(2) == 2:
        noises = torch.cat([run.noise_of(seed) for seed in (0, 1)])
        alone = torch.cat([run.generate(noise) for noise in noises.split(1)])
        error = distance(run.generate(noises), alone)
        assert error < BATCH_ROUNDING, f"candidates in one batch differ from single candidates by {error:.2g}"


@in_inference_mode
def grid_image(models):
    """BlendGrid shows the images of KSampler: bit for bit, or up to rounding after the steps that images share."""
    from chorus.nodes.blend_grid import varied_setting
    from chorus.techniques.saliency_blend.comfy_grid_images import GridImages, SamplingInputs

    samples, steps = models.family.latent(), 4
    positive, negative = models.prompts
    sampling = {**SAMPLING, "steps": steps}
    inputs = SamplingInputs(
        positive=positive, negative=negative, latent_image=samples, seed=1, sampler_name="euler", **sampling
    )
    vae = tiny_vae(parts(samples["samples"])[0].shape[1], video=models.family.latent_format().latent_dimensions == 3)
    for start, bound in ((0.0, 0.0), (0.5, SHARED_ROUNDING)):
        model, _ = blend(
            models.base, models.expert, *models.expert_prompts, start_percent=start, expert_strength=STRENGTH
        )
        run = GridImages(model, [varied_setting("rows", "bias = 0", model)], inputs, vae)
        expected = models.sample(model, steps=steps)
        for _ in range(2):
            found = run.layout.unpack(run.latent((0.0,)))
            error = 0.0 if same_bits(found, expected) else distance(found, expected)
            assert error <= bound, f"with start_percent {start:g}, differs from KSampler by {error:.2g}"


@in_inference_mode
def seed_map(models):
    """SeedMap samples as KSampler does, and CombineNoise gives the noises that SeedMap samples, bit for bit."""
    from chorus.nodes.seed_map import CombineNoise, SeedMap

    samples = models.family.latent()
    height, width = positions(samples)
    channels = parts(samples["samples"])[0].shape[1]
    video = models.family.latent_format().latent_dimensions == 3
    positive, negative = models.prompts
    wired = dict(model=models.base, positive=positive, negative=negative, latent_image=samples)
    scoring = dict(
        semantic_weight=0.0,
        references=torch.rand(2, 8 * height, 8 * width, 3, generator=torch.Generator().manual_seed(4)),
        vae=tiny_vae(channels, video=video),
    )
    noise, other = (custom.RandomNoise.execute(seed).args[0] for seed in (1, 7))
    few = dict(patches=2, pairs=2, checks=0, seed=7, **SAMPLING, sampler_name="euler", denoise=1.0)
    with mock.patch.object(ComfySeedSampler, "generate", autospec=True, side_effect=ComfySeedSampler.generate) as runs:
        _, mask, _, _ = SeedMap.execute(**{**defaults(SeedMap), **wired, **scoring, **few, "noise": noise}).args
    run, found, *_ = runs.call_args_list[0].args
    assert same_bits(run.layout.unpack(run.generate(found)), models.sample(models.base, seed=1)), "not as KSampler"
    _, halves, *_ = runs.call_args_list[1].args  # of the first pair, in which the other noise has seed 7
    kept = parts(run.layout.unpack(halves[:1] == found))[0].flatten(0, -3)[:1].float()
    assert 0 < kept.mean() < 1 and len(mask) == 1
    combined = CombineNoise.execute(noise, other, kept, 0.5).args[0]
    assert same_bits(combined.generate_noise(run.inputs.latent_image), run.layout.unpack(halves[:1])), (
        "CombineNoise differs from what SeedMap samples"
    )


def seed_gradient(models):
    """The gradient of SeedSelect's optimisation equals a finite difference along one direction.

    The guidance is small, because random networks are steep. The finite difference is the mean of those at two
    neighbouring step sizes, chosen where the two agree best: larger steps suffer from the curvature of the network, and
    smaller steps from the rounding of float32.
    """
    run = seed_sampler(models.base, models.family.latent(), models.prompts, **{**SAMPLING, "cfg": 1.2})
    _, found = gradient(run)
    assert torch.isfinite(found).all() and found.norm() > 0, "the gradient is 0 or not finite"
    direction, norm = direction_of(found), float(found.norm())
    for steps in ((1e-2, 3e-3, 1e-3), (1e-1, 3e-2, 1e-2)):
        differences = [finite_difference(run, direction, step=step) for step in steps]
        spread, expected = min((abs(a - b), (a + b) / 2) for a, b in pairwise(differences))
        if spread < 1e-2 * norm:
            break
    else:
        raise NotBuilt("finite differences do not converge in float32")
    slope = float((found * direction).sum())
    assert abs(slope - expected) < 5e-3 * norm + spread, f"derivative {slope:.6g}, finite difference {expected:.6g}"


def untrained_head(models):
    """An untrained head changes nothing."""
    patched = apply_head(models.base, head_for(models.base, size=0.0, cfg=CFG))
    assert same_bits(models.sample(patched), models.plain), "an untrained head changes the samples"


CELLS: dict[str, Callable[[Models], None]] = {
    "blend": blended_equals_definition,
    "expert everywhere": expert_everywhere,
    "same checkpoint": same_checkpoint,
    "other family": other_family,
    "neutral": neutral,
    "grid image": grid_image,
    "seed search": seed_search,
    "seed gradient": seed_gradient,
    "seed map": seed_map,
    "untrained head": untrained_head,
}


def family_cells(names=None) -> Iterator[tuple[str, str, Outcome]]:
    """(family, cell, outcome) of all cells, or only those of ``names``. Memory holds the models of one family at a time."""
    for name, reason in NOT_BUILT.items():
        if names is None or name in names:
            yield from ((name, cell, Outcome("not built", reason)) for cell in CELLS)
    for name, family in FAMILIES.items():
        if names is None or name in names:
            models = Models(family)
            yield from ((name, cell, outcome_of(lambda: check(models))) for cell, check in CELLS.items())  # noqa: B023
            del models
            gc.collect()
