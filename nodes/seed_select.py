"""SeedSelect (arXiv 2304.14530): finds the initial noise for a rare concept with a few reference images."""

import dataclasses
import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, Sampler
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..host.attachments import Conditioning
from ..host.shape_errors import explain_shape_errors
from ..techniques.seed_select import select as technique
from ..techniques.seed_select.comfy_files import model_details
from ..techniques.seed_select.comfy_inputs import KSamplerInputs
from ..techniques.seed_select.comfy_outputs import outputs
from ..techniques.seed_select.comfy_progress import InterruptProcessingException, SelectProgress
from ..techniques.seed_select.comfy_sampler import SAMPLERS, SCHEDULERS, ComfySeedSampler
from ..techniques.seed_select.comfy_scoring import ScoringSettings
from ..techniques.seed_select.comfy_session import OpenSession, SessionSettings
from ..techniques.seed_select.optimize import OptimizeSettings
from ..techniques.seed_select.records import Candidate
from ..techniques.seed_select.seed_list import parse_seeds
from ..techniques.seed_select.select import MODES, STARTS, SeedSelectSettings
from . import machine_widgets
from .checked_inputs import checks_inputs


@checks_inputs
class SeedSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeedSelect",
            display_name="Seed Select",
            category="chorus",
            description=(
                "Finds the initial noise from which the model generates a rare concept, guided by a few reference images. It"
                " searches among seeds, optimises the noise by gradient descent, or does both. The model is not changed. If you"
                " cancel the run, the best result so far is used."
            ),
            search_aliases=[
                "SeedSelect",
                "NAO",
                "best seed",
                "find a seed",
                "seed search",
                "noise optimisation",
                "rare concept",
                "find seed",
                "noise search",
                "search noise",
                "chorus",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model, with its LoRAs, patches or blend. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The prompt that names the concept."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, as for KSampler."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="One latent of an image or a video, empty or encoded, with or without a noise mask, as for KSampler.",
                ),
                io.Image.Input(
                    "references",
                    tooltip="A batch of images of the concept, ideally 3 to 5. They are stretched to the size of the generated"
                    " image before they are encoded.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Needed with the default semantic_weight. Compares the content of images; not needed if"
                    " semantic_weight is 0.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="search: tries many seeds with few steps, and the best again with more steps. It works with every"
                    " sampler. optimize: changes one noise by gradient descent through the whole sampling. It needs the sampler"
                    " euler, ddim or dpmpp_2m, and memory for a backward pass. search+optimize: optimises the best candidates"
                    " of a search.",
                ),
                io.Combo.Input(
                    "start",
                    options=list(STARTS),
                    default=STARTS[0],
                    tooltip="Where the candidates come from. noise: random noise of seed, seed + 1 and so on. inversion: the"
                    " references, each inverted to noise in 50 steps. centroid: the mean of these inverted noises, and points on the"
                    " paths from the mean to each of them. All have norms that are likely for random noise (NAO's norm-aware centroid"
                    " and paths). centroid needs at least 2 references.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the first candidate.",
                ),
                io.Int.Input(
                    "candidates", default=16, min=1, max=1024, tooltip="Number of candidates. Useful: 16 to 64."
                ),
                io.Int.Input(
                    "pick",
                    default=1,
                    min=1,
                    max=1024,
                    tooltip="Rank of the candidate to use, which is its number in the grid. Without a search: number of the"
                    " candidate, counted from 1.",
                ),
                io.Int.Input(
                    "count",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Number of images. If it is more than 1, the images start from noises on a path between the two best"
                    " noises. All noises on this path have norms that are likely for random noise (NAO's norm-aware path).",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps of the final image."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=30.0, step=0.1, tooltip="Guidance scale."),
                io.Combo.Input(
                    "sampler_name",
                    options=SAMPLERS,
                    default="euler",
                    tooltip="Sampler of the final image. Search: any. Optimisation: euler, dpmpp_2m or ddim.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=SCHEDULERS,
                    default="normal",
                    tooltip="Scheduler of the final image. The short runs of a search use beta.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="As in KSampler. If it is below 1, the short runs of a search start at the noise level of the full"
                    " run.",
                ),
                io.Int.Input(
                    "iterations",
                    default=30,
                    min=0,
                    max=1000,
                    tooltip="Iterations of the optimisation. 0: the noise is not changed. The authors use 30. With start centroid,"
                    " 5 are enough.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.1,
                    min=0.001,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    tooltip="Step size of the optimisation, divided by 10 from the fourth iteration on. The authors use 0.1."
                    " With start centroid, use 0.05.",
                ),
                io.Float.Input(
                    "semantic_weight",
                    default=10.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="Weight of the distance to the references' clip_vision embeddings. 0: off.",
                ),
                io.Float.Input(
                    "appearance_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Weight of the distance to the mean of the references' latents. 0: off.",
                ),
                io.Int.Input(
                    "first_steps",
                    default=4,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="Sampling steps in the first round of the search, at most the value of steps. Later rounds take more."
                    " With 1 or 2 steps the ranking is hardly better than chance, except for models that are made for so few"
                    " steps.",
                ),
                io.Float.Input(
                    "survivors",
                    default=0.25,
                    min=0.01,
                    max=0.5,
                    step=0.05,
                    advanced=True,
                    tooltip="Share of the candidates that pass each round. A larger share costs more and loses fewer good"
                    " candidates.",
                ),
                io.Int.Input(
                    "optimized",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="How many of the best candidates are optimised. The best result is used.",
                ),
                io.Int.Input(
                    "optimize_steps",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="Sampling steps during the optimisation. Fewer steps are faster but only approximate the final image."
                    " 0: the same number as steps.",
                ),
                io.Int.Input(
                    "last_steps",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="Backpropagate through the model only in the last n steps. This is faster but less exact. 0: in all"
                    " steps.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Gradient checkpointing. On: activations are recomputed, which needs the memory of only one step. Off:"
                    " a little faster, but needs the memory of all steps. If the memory does not suffice, an error states how"
                    " much is needed.",
                ),
                io.Float.Input(
                    "norm_guard",
                    default=3.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Largest allowed difference between the norm of the noise and the mean norm of random noise, in"
                    " standard deviations. 0: no limit, as in the authors' code.",
                ),
                io.Int.Input(
                    "patience",
                    default=10,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="Stop an optimisation after this many iterations without a better score. 0: never stop early, as in"
                    " the authors' code.",
                ),
                io.Int.Input(
                    "grid_size",
                    default=16,
                    min=1,
                    max=256,
                    advanced=True,
                    tooltip="How many of the best candidates the grid shows.",
                ),
                io.Int.Input(
                    "references_used",
                    optional=True,
                    default=0,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="How many of the references are used: those that are nearest to their common centre, by clip_vision if"
                    " it is connected, otherwise by the VAE. The report lists those left out. 0: all.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="The sigmas of SamplerCustomAdvanced, for models that need their own scheduler node. They replace"
                    " steps, scheduler and denoise.",
                ),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="The sampler of SamplerCustomAdvanced. It replaces sampler_name.",
                ),
                io.Guider.Input(
                    "guider",
                    optional=True,
                    tooltip="The guider of SamplerCustomAdvanced. It replaces model, positive, negative and cfg; connect its model to"
                    " model.",
                ),
                io.Float.Input(
                    "prompt_variation",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    round=0.001,
                    advanced=True,
                    tooltip="For distilled models, which generate nearly the same image from every noise. Each candidate also"
                    " has noise on the embeddings of the positive prompt, in the first 30 % of the sampling. Strength in"
                    " standard deviations of each token. Useful: 0.5 to 1. 0: off. Vary Prompt repeats it for KSampler.",
                ),
                machine_widgets.share(
                    "If several machines search together: number of this machine, from 0. It searches the seeds seed + share, seed +"
                    " share + shares and so on, as many as candidates states. Needs start noise."
                ),
                machine_widgets.shares("Number of machines that search together. share must be lower."),
                io.String.Input(
                    "seeds",
                    optional=True,
                    default="",
                    advanced=True,
                    tooltip="Searches these seeds, such as 1022, 1014, to compare the best of several machines. The inputs seed,"
                    " candidates and share are then not used. If first_steps equals steps, the final images of all seeds are"
                    " compared. Needs start noise. Empty: off.",
                ),
            ],
            outputs=[
                io.Noise.Output(
                    "noise",
                    display_name="noise",
                    tooltip="The noise, for SamplerCustomAdvanced with the same settings, and for Save Seed.",
                ),
                io.Int.Output(
                    "seed",
                    display_name="seed",
                    tooltip="After a search, if start is noise: KSampler at batch 1 generates the same samples from this seed with"
                    " the same settings, bit for bit. After an optimisation, if start is noise: the seed of the noise before the"
                    " optimisation. If start is inversion or centroid: the value of the input seed, from which the noise cannot"
                    " be generated. With prompt_variation, it is also the seed for Vary Prompt. The report states whether the"
                    " seed reproduces the result.",
                ),
                io.Latent.Output("samples", display_name="samples", tooltip="The final latents; decode them."),
                io.Image.Output(
                    "grid",
                    display_name="grid",
                    tooltip="The best candidates of the search with number, seed and score, then the final images.",
                ),
                io.Image.Output(
                    "preview",
                    display_name="preview",
                    tooltip="The best image, and a plot of the scores over model evaluations.",
                ),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Conditioning,
        negative: Conditioning,
        latent_image: dict[str, Any],
        references: Tensor,
        vae: VAE,
        mode: str,
        start: str,
        seed: int,
        candidates: int,
        pick: int,
        count: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        iterations: int,
        learning_rate: float,
        semantic_weight: float,
        appearance_weight: float,
        first_steps: int,
        survivors: float,
        optimized: int,
        optimize_steps: int,
        last_steps: int,
        checkpointing: bool,
        norm_guard: float,
        patience: int,
        grid_size: int,
        clip_vision: ClipVisionModel | None = None,
        references_used: int = 0,
        sigmas: Tensor | None = None,
        sampler: Sampler | None = None,
        guider: CFGGuider | None = None,
        prompt_variation: float = 0.0,
        share: int = 0,
        shares: int = 1,
        seeds: str | None = "",
    ) -> io.NodeOutput:
        weights = dict(semantic_weight=semantic_weight, appearance_weight=appearance_weight)
        optimize = OptimizeSettings(
            iterations=iterations,
            learning_rate=learning_rate,
            shell_width=norm_guard or math.inf,
            patience=patience,
        )
        sampling: dict[str, Any] = dict(cfg=cfg, sampler_name=sampler_name, scheduler=scheduler, denoise=denoise)
        inputs = KSamplerInputs(
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent_image,
            steps=steps,
            seed=seed,
            sigmas=sigmas,
            sampler=sampler,
            guider=guider,
            **sampling,
        ).checked()
        steps = inputs.steps
        settings = SeedSelectSettings(
            mode=mode,
            start=start,
            seed=seed,
            candidates=candidates,
            pick=pick,
            count=count,
            steps=steps,
            first_steps=min(first_steps, steps),
            survivors=survivors,
            optimized=optimized,
            optimize=optimize,
            share=share,
            shares=shares,
            seeds=parse_seeds(seeds or ""),
            prompt_variation=prompt_variation,
        )
        scoring = ScoringSettings(
            references=references, vae=vae, clip_vision=clip_vision, references_used=references_used, **weights
        )
        run_sampler = ComfySeedSampler(inputs, scoring, prompt_variation)
        if settings.optimizes:
            session = SessionSettings(
                steps=optimize_steps or None,
                sampler=inputs.plain_sampler,
                seed=seed,
                last_steps=last_steps or None,
                checkpoint=checkpointing,
            )
            run_sampler.allow_gradients(session)
        further = dict(optimize_steps=optimize_steps, last_steps=last_steps)
        details = model_details(inputs.model) | {"settings": json.dumps(dataclasses.asdict(settings) | further)}
        details |= {
            "sampling": json.dumps(sampling | inputs.connected),
            "scoring": json.dumps(weights | {"references": len(run_sampler.scorer.latents)}),
        }
        select = technique.SeedSelect(settings, run_sampler)
        with explain_shape_errors("the model"):
            interrupted = run(select, run_sampler)
        notes = []
        if settings.searches and first_steps > steps:
            notes.append(
                f"first_steps {first_steps} is more than steps {steps}, so the first round takes {steps} steps; lower"
                " first_steps for a faster search"
            )
        return io.NodeOutput(*outputs(select, interrupted, details, grid_size, notes))


def run(select: technique.SeedSelect, sampler: ComfySeedSampler) -> bool:
    """Run ``select``; returns True if the user interrupted it.

    In both cases ``select.results`` is not empty: after an interrupt it contains the image of the best noise so far.
    Raises InterruptProcessingException if the run has no result yet.
    """
    progress = SelectProgress(select, sampler.model, sampler.decode)
    sampler.callback = progress.callback

    def optimize(session: OpenSession, starts: Sequence[Candidate]) -> None:
        for start in starts:
            # decode in the session, since ComfyUI's VAE decode could unload the session's models
            select.optimize_one(start, session, partial(progress, decode=session.pictures))

    try:
        select.choose(progress)
        if select.settings.optimizes:
            for session, starts in sampler.gradient_sessions(select.chosen):
                session.run(partial(optimize, starts=starts))
            select.sort_optimized()
        select.generate(progress)
    except InterruptProcessingException:
        if select.best is None:
            raise
        select.finish_interrupted()
        return True
    return False


NODES: list[type[io.ComfyNode]] = [SeedSelect]
