"""The nodes around the initial noise: find it by a few reference pictures (SeedSelect, arXiv 2304.14530), save, load."""

import dataclasses
import json
import math
from collections.abc import Callable

import torch
from comfy_api.latest import io

from ..host.seed_files import FILES as SEED_FILES
from ..host.seed_files import SeedNoise, load_seed, model_details, save_seed
from ..host.seed_generate import SAMPLERS, SCHEDULERS, SeedRun
from ..host.seed_pictures import check_vae, embeddings, encode
from ..host.seed_progress import InterruptProcessingException, SeedProgress
from ..pictures.seed_view import Tile, draw_grid, draw_preview
from ..techniques import seed_select as technique
from ..techniques.seed_inversion import invert
from ..techniques.seed_losses import ReferenceLoss, check_references, embedding_centroid, latent_centroid
from ..techniques.seed_optimize import GradientCost, OptimizeSettings, SeedGradients
from ..techniques.seed_records import Found
from ..techniques.seed_search import SeedSearch

INVERSION_STEPS = 50  # of NAO's authors, without guidance
LATE_STEPS = 3  # whose latents the authors' loss sees


class SeedSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SeedSelect",
            display_name="Seed Select",
            category="chorus",
            description=(
                "Finds the initial noise from which the model paints a rare concept, by a few reference pictures: searches"
                " among seeds, optimises the noise by gradient, or both. The model is not changed. Cancel keeps the best so far."
            ),
            search_aliases=["SeedSelect", "NAO", "best seed", "seed search", "noise optimisation", "rare concept"],
            inputs=[
                io.Model.Input("model", tooltip="With its LoRAs, patches or blend. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The prompt that names the concept."),
                io.Conditioning.Input("negative"),
                io.Latent.Input(
                    "latent_image",
                    tooltip="One latent, empty or of a picture, with its noise mask if it has one, as for KSampler.",
                ),
                io.Image.Input(
                    "references",
                    tooltip="Pictures of the concept as a batch, best 3 to 5. For the latents they are squashed to the"
                    " picture's size.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Says what a picture shows. Needed unless semantic_weight is 0.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(technique.MODES),
                    default=technique.MODES[0],
                    tooltip="search: many seeds with few steps, the best with more; works with every sampler. optimize: the"
                    " gradient on one noise through the whole sampling; euler, ddim, dpmpp_2m; needs memory for a backward"
                    " pass. search+optimize: the best candidates become starts.",
                ),
                io.Combo.Input(
                    "start",
                    options=list(technique.STARTS),
                    default=technique.STARTS[0],
                    tooltip="The candidates. noise: of seed, seed + 1, ... inversion: the noises of the references, 50 steps"
                    " each. centroid: between those, from their norm-aware centroid out; at least 2 references.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the first candidate.",
                ),
                io.Int.Input(
                    "candidates", default=16, min=1, max=4096, tooltip="How many are searched. Useful: 16 to 64."
                ),
                io.Int.Input(
                    "pick",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Which of the ranking to take, by its number in the grid. Where nothing is searched: which of"
                    " the candidates.",
                ),
                io.Int.Input(
                    "count",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures. More than one lie on the norm-aware path between the two best noises.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Of the finished picture."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance scale."),
                io.Combo.Input("sampler_name", options=SAMPLERS, default="euler"),
                io.Combo.Input("scheduler", options=SCHEDULERS, default="normal"),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="As KSampler's. Below 1, raise first_steps: a run of one step always starts at pure noise.",
                ),
                io.Int.Input(
                    "iterations",
                    default=30,
                    min=0,
                    max=10000,
                    tooltip="Of the optimisation. 0 keeps the noise. 30 are the authors'; 5 suffice from a centroid.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.1,
                    min=0.0001,
                    max=10.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="A tenth of it from the fourth iteration on. 0.1 is the authors'; 0.05 from a centroid.",
                ),
                io.Float.Input(
                    "semantic_weight",
                    default=10.0,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="Of the distance to the references' embeddings by clip_vision. 0 is off.",
                ),
                io.Float.Input(
                    "appearance_weight",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Of the distance to the mean of the references' latents. 0 is off.",
                ),
                io.Int.Input(
                    "first_steps",
                    default=1,
                    min=1,
                    max=10000,
                    advanced=True,
                    tooltip="Steps of the first round of the search; they grow from round to round.",
                ),
                io.Float.Input(
                    "keep",
                    default=0.25,
                    min=0.01,
                    max=0.5,
                    step=0.05,
                    advanced=True,
                    tooltip="Share of the candidates that stay from round to round. More is dearer and surer.",
                ),
                io.Int.Input(
                    "optimized",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="How many of the best candidates are optimised. The best of them wins.",
                ),
                io.Int.Input(
                    "optimize_steps",
                    default=0,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="Steps of the sampling that is optimised: fewer are faster, and only stand for the finished"
                    " picture. 0: steps.",
                ),
                io.Int.Input(
                    "last_steps",
                    default=0,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="The gradient passes through the model in that many last steps only: faster, less exact."
                    " 0: in all.",
                ),
                io.Float.Input(
                    "norm_guard",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    advanced=True,
                    tooltip="How many standard deviations the noise's norm may leave that of random noise. 0: any, as the"
                    " authors have it.",
                ),
                io.Int.Input(
                    "patience",
                    default=10,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="Iterations without a new best that end an optimisation. 0: none do, as the authors have it.",
                ),
                io.Int.Input(
                    "grid_size",
                    default=16,
                    min=1,
                    max=256,
                    advanced=True,
                    tooltip="How many of the best candidates the grid shows.",
                ),
            ],
            outputs=[
                io.Noise.Output(
                    "noise",
                    display_name="noise",
                    tooltip="For SamplerCustomAdvanced with the same settings, and Save Seed.",
                ),
                io.Int.Output(
                    "seed",
                    display_name="seed",
                    tooltip="Of a search: KSampler at batch 1 with it and the same settings gives samples, bit for bit. Else"
                    " that of the start; the report says whether it reproduces the result.",
                ),
                io.Latent.Output("samples", display_name="samples", tooltip="Finished: only decode them."),
                io.Image.Output(
                    "grid",
                    display_name="grid",
                    tooltip="The best candidates of the search with number, seed and score, then what was made of them.",
                ),
                io.Image.Output(
                    "preview", display_name="preview", tooltip="The best picture beside the scores over evaluations."
                ),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        references,
        vae,
        mode,
        start,
        seed,
        candidates,
        pick,
        count,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        iterations,
        learning_rate,
        semantic_weight,
        appearance_weight,
        first_steps,
        keep,
        optimized,
        optimize_steps,
        last_steps,
        norm_guard,
        patience,
        grid_size,
        clip_vision=None,
    ) -> io.NodeOutput:
        optimize = OptimizeSettings(iterations, learning_rate, shell_width=norm_guard or math.inf, patience=patience)
        settings = technique.SeedSelectSettings(
            mode, start, seed, candidates, pick, count, steps, first_steps, keep, optimized, optimize
        )
        run = SeedRun(model, positive, negative, latent_image, steps, cfg, sampler_name, scheduler, denoise, seed)
        loss = _Loss(run, references, vae, clip_vision, semantic_weight, appearance_weight)
        path = dict(sampler=sampler_name, steps=optimize_steps or None, last_steps=last_steps or None, seed=seed)
        if settings.optimizes:
            run.check_session(vae=vae, clip_vision=loss.clip_vision, **path)
        sampling = dict(cfg=cfg, sampler_name=sampler_name, scheduler=scheduler, denoise=denoise)
        scoring = dict(semantic_weight=semantic_weight, appearance_weight=appearance_weight, references=len(references))
        others = dict(optimize_steps=optimize_steps, last_steps=last_steps)
        details = model_details(model) | {"settings": json.dumps(dataclasses.asdict(settings) | others)}
        details |= {"sampling": json.dumps(sampling), "scoring": json.dumps(scoring)}
        select, interrupted = _select(run, loss, settings, path)
        return io.NodeOutput(*_outputs(run, loss, select, interrupted, details, grid_size))


class _Loss:
    """The score against the references, without gradients or in a session, and how their pictures are made."""

    def __init__(self, run: SeedRun, references, vae, clip_vision, semantic_weight: float, appearance_weight: float):
        check_references(references)
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

    def __init__(self, run: SeedRun, loss: _Loss):
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


def _select(run: SeedRun, loss: _Loss, settings: technique.SeedSelectSettings, path: dict):
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
    sampling = technique.SeedSampling(
        run.noise_of,
        lambda noises, steps, seeds: run.generate(noises, steps, seeds, live.step),
        score,
        session,
        inversions,
        batch=run.batch_size(settings.candidates),
        calls_per_step=run.calls_per_step,
        gradient_cost=GradientCost(steps, steps + min(path["last_steps"] or steps, steps)),
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


def _outputs(run: SeedRun, loss: _Loss, select: technique.SeedSelect, interrupted: bool, details: dict, grid_size: int):
    """noise, seed, samples, grid, preview, report."""
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


def _ranked_tiles(loss: _Loss, search: SeedSearch, most: int) -> list[Tile]:
    tiles = []
    for k, index in enumerate(search.ranking[:most], start=1):
        (score, steps), label = search.last_score(index), search.candidates[index].label
        tiles.append(_tile(loss, search.latents[index], f"{k}: {label}", f"score {score:.4f}, steps {steps}"))
    return tiles


def _tile(loss: _Loss, latent: torch.Tensor, *captions: str) -> Tile:
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


class SaveSeed(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaveSeed",
            display_name="Save Seed",
            category="chorus",
            description="Writes a noise of Seed Select with its score, its settings and the model's hash.",
            search_aliases=["save noise", "export seed"],
            is_output_node=True,
            inputs=[
                io.Noise.Input("noise", tooltip="From Seed Select or Load Seed."),
                io.String.Input(
                    "filename_prefix",
                    default="seeds/ComfyUI",
                    tooltip="Below the output folder. A number follows; no file is overwritten.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, noise, filename_prefix) -> io.NodeOutput:
        if not isinstance(noise, SeedNoise):
            raise ValueError(
                f"this noise ({type(noise).__name__}) is drawn anew for each latent and holds nothing to save; wire that of"
                " Seed Select or Load Seed, or keep its integer seed"
            )
        return io.NodeOutput(ui={"seeds": [save_seed(noise, filename_prefix)]})


class LoadSeed(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadSeed",
            display_name="Load Seed",
            category="chorus",
            description="Reads a noise that Save Seed wrote, for SamplerCustomAdvanced.",
            search_aliases=["load noise", "saved seed"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=SEED_FILES.names(),
                    tooltip="From the input or the output folder. The latent must have the size that it was found for.",
                )
            ],
            outputs=[io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, file) -> bool | str:
        return SEED_FILES.validate(file)

    @classmethod
    def fingerprint_inputs(cls, file) -> str | float:
        return SEED_FILES.fingerprint(file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(load_seed(file))


NODES: list[type[io.ComfyNode]] = [SeedSelect, SaveSeed, LoadSeed]
