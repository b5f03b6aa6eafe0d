"""SeedSelect (arXiv 2304.14530): find the initial noise for a rare concept by a few reference pictures."""

import dataclasses
import json
import math
from functools import partial
from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..host.attachments import Conditioning
from ..host.shape_errors import explained
from ..techniques.seed_select import select as technique
from ..techniques.seed_select.comfy_files import model_details
from ..techniques.seed_select.comfy_outputs import outputs
from ..techniques.seed_select.comfy_progress import InterruptProcessingException, SelectProgress
from ..techniques.seed_select.comfy_sampler import SAMPLERS, SCHEDULERS, ComfySeedSampler, KSamplerInputs
from ..techniques.seed_select.comfy_scoring import ScoringSettings
from ..techniques.seed_select.comfy_session import OpenSession, SessionSettings
from ..techniques.seed_select.optimize import OptimizeSettings
from ..techniques.seed_select.select import MODES, STARTS, SeedSelectSettings
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
                "Finds the initial noise from which the model paints a rare concept, by a few reference pictures: searches"
                " among seeds, optimises the noise by gradient, or both. The model is not changed. Cancel keeps the best so far."
            ),
            search_aliases=["SeedSelect", "NAO", "best seed", "seed search", "noise optimisation", "rare concept"],
            inputs=[
                io.Model.Input("model", tooltip="With its LoRAs, patches or blend. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The prompt that names the concept."),
                io.Conditioning.Input("negative", tooltip="What guidance leads away from, as for KSampler."),
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
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="search: many seeds with few steps, the best with more; works with every sampler. optimize: the"
                    " gradient on one noise through the whole sampling; euler, ddim, dpmpp_2m; needs memory for a backward"
                    " pass. search+optimize: the best candidates become starts.",
                ),
                io.Combo.Input(
                    "start",
                    options=list(STARTS),
                    default=STARTS[0],
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
                io.Combo.Input(
                    "sampler_name",
                    options=SAMPLERS,
                    default="euler",
                    tooltip="Of the finished picture. A search takes any, optimising euler, dpmpp_2m or ddim.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=SCHEDULERS,
                    default="normal",
                    tooltip="Of the finished picture. The short runs of a search take beta.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="As KSampler's. Below 1 a search's short runs begin at the noise level of the full one.",
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
                    default=4,
                    min=1,
                    max=10000,
                    advanced=True,
                    tooltip="Steps of the first round of the search, at most all; they grow from round to round. Pictures of 1 or"
                    " 2 steps hardly tell which seed is good, unless the model is made for so few.",
                ),
                io.Float.Input(
                    "survivors",
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
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Computes activations again instead of keeping them: the memory of one step, whatever steps are."
                    " Off: a little faster, and the memory of all steps; refused with its size if that is too much.",
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
    ) -> io.NodeOutput:
        weights = dict(semantic_weight=semantic_weight, appearance_weight=appearance_weight)
        optimize = OptimizeSettings(
            iterations=iterations,
            learning_rate=learning_rate,
            shell_width=norm_guard or math.inf,
            patience=patience,
        )
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
        )
        sampling: dict[str, Any] = dict(cfg=cfg, sampler_name=sampler_name, scheduler=scheduler, denoise=denoise)
        inputs = KSamplerInputs(
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent_image,
            steps=steps,
            seed=seed,
            **sampling,
        )
        scoring = ScoringSettings(references=references, vae=vae, clip_vision=clip_vision, **weights)
        sampler = ComfySeedSampler(inputs, scoring)
        if settings.optimizes:
            session = SessionSettings(
                steps=optimize_steps or None,
                sampler=sampler_name,
                seed=seed,
                last_steps=last_steps or None,
                checkpoint=checkpointing,
            )
            sampler.allow_gradients(session)
        others = dict(optimize_steps=optimize_steps, last_steps=last_steps)
        details = model_details(model) | {"settings": json.dumps(dataclasses.asdict(settings) | others)}
        details |= {"sampling": json.dumps(sampling), "scoring": json.dumps(weights | {"references": len(references)})}
        select = technique.SeedSelect(settings, sampler)
        with explained("the model"):
            interrupted = run(select, sampler)
        return io.NodeOutput(*outputs(select, interrupted, details, grid_size))


def run(select: technique.SeedSelect, sampler: ComfySeedSampler) -> bool:
    """Run ``select``; True if the user interrupted it: then the best so far is finished. Without any, that is raised."""
    progress = SelectProgress(select, sampler.model, sampler.decode)
    sampler.callback = progress.callback

    def optimize(session: OpenSession) -> None:
        # the host's own decode could unload what the session has loaded
        select.optimize(session, partial(progress, decode=session.decode))

    try:
        select.choose(progress)
        if select.settings.optimizes:
            assert sampler.gradients is not None  # the node has allowed them
            sampler.gradients.run(optimize)
        select.draw(progress)
    except InterruptProcessingException:
        if select.best is None:
            raise
        select.settle()
        return True
    return False


NODES: list[type[io.ComfyNode]] = [SeedSelect]
