"""What Seed Select wires together: the technique, the host's sampling, the score against the references, what is shown."""

from collections.abc import Callable

import torch

from ...host.images import check_vae, embeddings, encode
from . import select as technique
from .comfy_files import SeedNoise
from .comfy_progress import InterruptProcessingException, SeedProgress
from .comfy_sampler import SeedRun
from .inversion import invert
from .losses import ReferenceLoss, check_references, embedding_centroid, latent_centroid
from .optimize import GradientCost, SeedGradients
from .records import Found
from .search import SeedSearch
from .view import Tile, draw_grid, draw_preview

INVERSION_STEPS = 50  # of NAO's authors, without guidance
LATE_STEPS = 3  # whose latents the authors' loss sees


class Score:
    """The score against the references, without gradients or in a session, and how their pictures are made."""

    def __init__(self, run: SeedRun, references, vae, clip_vision, semantic_weight: float, appearance_weight: float):
        check_references(references)
        if references.shape[-1] < 3:
            raise ValueError(
                f"the references have {references.shape[-1]} channels; wire RGB pictures (Load Image gives them)"
            )
        check_vae(vae)
        self.run, self.vae = run, vae
        self.clip_vision = clip_vision if semantic_weight > 0.0 else None
        self._weights = dict(semantic_weight=semantic_weight, appearance_weight=appearance_weight)
        self._embedding = None if self.clip_vision is None else embedding_centroid(embeddings(clip_vision, references))
        self.latents = run.to_model(encode(vae, references, run.samples))  # [K, C, h, w]
        self.score = self._with(lambda pictures: embeddings(clip_vision, pictures), self.decode, run.to_latent)

    def in_session(self, session) -> ReferenceLoss:
        return self._with(session.embed, session.decode, session.to_latent)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latent)

    def _with(self, embed: Callable, decode: Callable, to_latent: Callable) -> ReferenceLoss:
        centroid = latent_centroid(self.latents)
        known = self._embedding, None if self._embedding is None else lambda x: embed(decode(to_latent(x)))
        return ReferenceLoss(centroid, *known, **self._weights)


class _Live:
    """What the user sees meanwhile: how far it is, the best score so far and its picture."""

    def __init__(self, run: SeedRun, loss: Score):
        self.model, self.decode = run.model, loss.decode
        self.progress = SeedProgress(run.model, 1)
        self.select: technique.SeedSelect | None = None
        self._shown: torch.Tensor | None = None

    def begin(self, steps: int, text: str) -> None:
        self.progress = SeedProgress(self.model, steps)
        self.progress.show(text=text)

    def step(self, *step) -> None:
        """As a sampler calls it; the estimates of x0 show until there is a best picture."""
        self.progress.bar.total = self.select.planned
        if self._shown is None:
            self.progress.callback(*step)
        else:
            self.progress.show(steps=1)

    def __call__(self, done: int, total: int, score: float, latent: Callable[[], torch.Tensor]) -> None:
        self.progress.bar.total = total
        best, picture = latent(), None
        if best is not self._shown:
            with torch.no_grad():
                self._shown, picture = best, self.decode(best)[0]
        text = f"best score {score:.4f}, {done} of {total} model evaluations"
        self.progress.show(picture, done - self.progress.done, text)


def find(run: SeedRun, loss: Score, settings: technique.SeedSelectSettings, path: dict):
    """The finished run, and whether the user ended it early."""
    live = _Live(run, loss)

    def score(latents):
        return loss.score([run.to_model(x) for x in latents])

    def session(work):
        def inside(s):
            late = min(LATE_STEPS, len(s.sigmas) - 1)
            live.decode = s.decode  # the host's own decode could unload what the session has loaded
            work(SeedGradients(lambda noise: s.generate(noise, late), loss.in_session(s), s.to_latent))

        try:
            run.session(inside, vae=loss.vae, clip_vision=loss.clip_vision, **path)
        finally:
            live.decode = loss.decode

    def inversions():
        steps = INVERSION_STEPS * len(loss.latents)
        live.begin(steps, f"inverting {len(loss.latents)} references")

        def work(s):
            def denoise(x, sigma):
                live.progress.show(steps=1)
                return s.denoise(x, sigma)

            return [s.noise_of(invert(denoise, x, s.sigmas, flow=s.flow)).cpu() for x in loss.latents.split(1)]

        found = run.session(work, gradients=False, cfg=1.0, steps=INVERSION_STEPS)
        live.begin(1, "")
        return found

    steps = len(run.sigmas(path["steps"])) - 1
    again = min(path["last_steps"] or steps, steps) if path["checkpoint"] else 0
    sampling = technique.SeedSampling(
        run.noise_of,
        lambda noises, steps, seeds: run.generate(noises, steps, seeds, live.step),
        score,
        session,
        inversions,
        batch=run.batch_size(settings.candidates),
        calls_per_step=run.calls_per_step,
        gradient_cost=GradientCost(steps, steps + again),
    )
    live.select = select = technique.SeedSelect(settings, sampling)
    try:
        select.run(live)
    except InterruptProcessingException:
        if select.best is None:
            raise
        select.settle()
        return select, True
    return select, False


def outputs(run: SeedRun, loss: Score, select: technique.SeedSelect, interrupted: bool, details: dict, grid_size: int):
    """noise, seed, samples, grid, preview, report. The first Cancel costs none of them, when they are drawn either."""
    try:
        return _outputs(run, loss, select, interrupted, details, grid_size)
    except InterruptProcessingException:
        if interrupted:
            raise
        return _outputs(run, loss, select, True, details, grid_size)


def _outputs(run: SeedRun, loss: Score, select: technique.SeedSelect, interrupted: bool, details: dict, grid_size: int):
    best = select.pictures[0]
    seed = best.sampler_seed if best.seed is None else best.seed
    noise = SeedNoise(
        torch.cat([f.noise.cpu() for f in select.pictures]),
        best.sampler_seed,
        {**details, "found": best.label, "score": f"{best.score:.6g}"},
    )
    results = [
        _tile(loss, f.latent, f"picture {k}: {f.label}", f"score {f.score:.4f}")
        for k, f in enumerate(select.pictures, start=1)
    ]
    tiles = _ranked_tiles(loss, select.search, grid_size) if select.search else []
    if select.optimizations or len(results) > 1 or not tiles:
        tiles += results
    return (
        noise,
        seed,
        _latent(run, select.pictures),
        draw_grid(tiles)[None],
        draw_preview(results[0], select.series())[None],
        _report(run, select, interrupted),
    )


def _ranked_tiles(loss: Score, search: SeedSearch, most: int) -> list[Tile]:
    tiles = []
    for k, index in enumerate(search.ranking[:most], start=1):
        (score, steps), label = search.last_score(index), search.candidates[index].label
        tiles.append(_tile(loss, search.latents[index], f"{k}: {label}", f"score {score:.4f}, steps {steps}"))
    return tiles


def _tile(loss: Score, latent: torch.Tensor, *captions: str) -> Tile:
    return Tile(loss.decode(latent)[0], captions)


def _latent(run: SeedRun, pictures: list[Found]) -> dict:
    """As KSampler gives it; a place in a batch is that of one picture."""
    gone = {"downscale_ratio_spacial", "downscale_ratio_temporal", *(("batch_index",) if len(pictures) > 1 else ())}
    kept = {k: v for k, v in run.latent_image.items() if k not in gone}
    return {**kept, "samples": torch.cat([f.latent for f in pictures])}


def _report(run: SeedRun, select: technique.SeedSelect, interrupted: bool) -> str:
    lines = [select.report(), f"rows through the networks: {run.evaluations}"]
    if run.backward_evaluations:
        lines[-1] += f", {run.backward_evaluations} of them again for the gradient"
    if interrupted:
        lines.insert(0, "interrupted: this is the best so far; it stays until an input changes")
    return "\n".join(lines)
