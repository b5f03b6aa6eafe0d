"""TuneBlend and BlendGrid: find the settings of a blend by scores, and compare them on a contact sheet."""

from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.samplers import SAMPLER_NAMES, SCHEDULER_NAMES
from comfy.sd import CLIP, VAE
from comfy_api.latest import io
from torch import Tensor

from ..host.attachments import Conditioning
from ..techniques.saliency_blend.comfy_grid import make_grid
from ..techniques.saliency_blend.comfy_image_score import ImageScore
from ..techniques.saliency_blend.comfy_tuning import BlendCandidates, SamplingInputs, tuned_chain
from ..techniques.saliency_blend.comfy_tuning_run import tune
from ..techniques.saliency_blend.tuning import plan_tuning
from ..techniques.saliency_blend.tuning_space import NAMES, Limits, Space, read_space
from .checked_inputs import checks_inputs
from .saliency_noise_blend import SaliencyNoiseBlend

# mask_refresh 100 keeps the first mask for up to 100 steps
TUNED = "bias = -1 to 1\nstart_percent = 0 to 0.3\nend_percent = 0.7 to 1\nmask_refresh = 1 | 100"


def widget_limits() -> dict[str, Limits]:
    """The limits of the settings that may move, as SaliencyNoiseBlend's widgets have them."""
    found = {}
    for widget in SaliencyNoiseBlend.define_schema().inputs:
        if widget.id not in NAMES:
            continue
        if isinstance(widget, io.Combo.Input):
            found[widget.id] = Limits(options=tuple(str(option) for option in widget.options or ()))
        elif isinstance(widget, (io.Int.Input, io.Float.Input)):
            whole = isinstance(widget, io.Int.Input)
            found[widget.id] = Limits(widget.min or 0.0, widget.max or 0.0, widget.step or 1.0, whole)
    return found


def space_of(text: str, model: ModelPatcher) -> Space:
    """The settings in ``text``, for the blend of ``model``."""
    return read_space(text, [expert.label for expert in tuned_chain(model).experts], widget_limits())


def _model() -> io.Input:
    return io.Model.Input(
        "model", tooltip="A blended model, from Saliency Noise Blend. Chains of several are possible."
    )


def _conditionings() -> list[io.Input]:
    return [
        io.Conditioning.Input("positive", tooltip="As in KSampler."),
        io.Conditioning.Input("negative", tooltip="As in KSampler."),
        io.Latent.Input("latent_image", tooltip="An empty latent of one image or video."),
        io.Vae.Input("vae", tooltip="The VAE of the blended models."),
    ]


def _sampling(seed: str) -> list[io.Input]:
    return [
        io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=seed),
        io.Int.Input("steps", default=20, min=1, max=1000, tooltip="As in KSampler."),
        io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="As in KSampler."),
        io.Combo.Input("sampler_name", options=SAMPLER_NAMES, default="euler", tooltip="As in KSampler."),
        io.Combo.Input("scheduler", options=SCHEDULER_NAMES, default="normal", tooltip="As in KSampler."),
    ]


@checks_inputs
class TuneBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TuneBlend",
            display_name="Tune Blend",
            category="chorus",
            description=(
                "Finds the settings of a blend whose images are nearest to a description or to reference images. Many"
                " settings are tried in few steps, the best in all steps, and then settings near the best."
            ),
            is_experimental=True,  # not better than random search at the same cost, see BENCHMARKS.md
            search_aliases=["MagicFusion", "tune blend", "find blend settings", "optimise weights", "auto blend"],
            inputs=[
                _model(),
                *_conditionings(),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder that compares the images with references or prompts."
                ),
                io.Image.Input(
                    "references", optional=True, tooltip="Images of what the blend should generate, ideally 3 to 5."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For prompt_score: the text encoder that was trained together with clip_vision, such as"
                    " clip_l with CLIP ViT-L/14. The demo's clip_vision needs none.",
                ),
                io.String.Input(
                    "prompt_score",
                    default="",
                    multiline=True,
                    tooltip="What the images should show, one prompt per line. The score is the mean distance from the"
                    " lines and from the references; lower is better. Empty: only the references count.",
                ),
                io.String.Input(
                    "settings",
                    default=TUNED,
                    multiline=True,
                    tooltip="The settings that may move, one per line, with a range or values: bias = -1 to 1, or:"
                    " saliency = own | shared. For one expert of a chain, by its label: bias of animals = -1 to 1. All"
                    " other settings stay as they are in the nodes.",
                ),
                io.Int.Input(
                    "evaluations",
                    default=64,
                    min=0,
                    max=2048,
                    tooltip="Cost of the search in images of all steps. 64 with 4 seeds try some 40 combinations of"
                    " settings. 0: only the connected settings are scored, and the model is passed on unchanged.",
                ),
                io.Int.Input(
                    "seeds",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Number of seeds over which settings are scored: seed, seed + 1 and so on. With more seeds,"
                    " settings are found that also work for others.",
                ),
                *_sampling("The first seed of the images, and the seed of the search."),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The blend with the best settings."),
                io.String.Output(
                    "settings", display_name="settings", tooltip="The best settings, to type into the nodes."
                ),
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="The best settings with their scores and the first seed's image, and the connected settings.",
                ),
                io.Image.Output(
                    "surface",
                    display_name="surface",
                    tooltip="The expected score over the two settings that matter most.",
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
        vae: VAE,
        clip_vision: ClipVisionModel,
        prompt_score: str,
        settings: str,
        evaluations: int,
        seeds: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        references: Tensor | None = None,
        clip: CLIP | None = None,
    ) -> io.NodeOutput:
        space = space_of(settings, model)
        if not space and evaluations:
            raise ValueError(
                "no setting may move; write for example: bias = -1 to 1 into settings, or set evaluations to 0"
            )
        plan = plan_tuning(evaluations, steps, seeds) if evaluations else None
        inputs = SamplingInputs(
            positive=positive,
            negative=negative,
            latent_image=latent_image,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler_name,
            scheduler=scheduler,
        )
        candidates = BlendCandidates(model, space, inputs, vae)
        prompts = [line.strip() for line in prompt_score.splitlines() if line.strip()]
        score = ImageScore(clip_vision, references, prompts, clip)
        return io.NodeOutput(*tune(candidates, score, plan, seeds))


@checks_inputs
class BlendGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendGrid",
            display_name="Blend Grid",
            category="chorus",
            description="A contact sheet of a blend over the values of one or two settings, with the same noise.",
            search_aliases=["MagicFusion", "XY plot", "compare blend settings", "grid"],
            inputs=[
                _model(),
                *_conditionings(),
                io.String.Input(
                    "rows",
                    default="bias = -1 | 0 | 1",
                    tooltip="A setting with its values, for the rows: bias = -1 | 0 | 1, or: bias = -1 to 1 by 0.5.",
                ),
                io.String.Input(
                    "columns",
                    default="start_percent = 0 | 0.1 | 0.2",
                    tooltip="A setting with its values, for the columns. Empty: only rows.",
                ),
                *_sampling("As in KSampler. All images have the noise of this seed."),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet"),
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
        vae: VAE,
        rows: str,
        columns: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
    ) -> io.NodeOutput:
        spaces = space_of(rows, model), space_of(columns, model)
        inputs = SamplingInputs(
            positive=positive,
            negative=negative,
            latent_image=latent_image,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler_name,
            scheduler=scheduler,
        )
        return io.NodeOutput(*make_grid(model, spaces, inputs, vae))


NODES: list[type[io.ComfyNode]] = [TuneBlend, BlendGrid]
