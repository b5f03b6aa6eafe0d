"""BlendGrid: a contact sheet of a blend over the values of one or two settings."""

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.samplers import SAMPLER_NAMES, SCHEDULER_NAMES
from comfy.sd import VAE
from comfy_api.latest import io

from ..host.attachments import Conditioning
from ..techniques.saliency_blend.comfy_grid import make_grid
from ..techniques.saliency_blend.comfy_grid_images import SamplingInputs, chain_of
from ..techniques.saliency_blend.varied_settings import NAMES, Limits, VariedSetting, read_setting
from .checked_inputs import checks_inputs
from .saliency_noise_blend import SaliencyNoiseBlend


def widget_limits() -> dict[str, Limits]:
    """The limits of the settings that may vary, as SaliencyNoiseBlend's widgets have them."""
    found = {}
    for widget in SaliencyNoiseBlend.define_schema().inputs:
        if widget.id not in NAMES:
            continue
        if isinstance(widget, io.Combo.Input):
            found[widget.id] = Limits(options=tuple(str(option) for option in widget.options or ()))
        elif isinstance(widget, (io.Int.Input, io.Float.Input)):
            whole = isinstance(widget, io.Int.Input)
            found[widget.id] = Limits(widget.min or 0.0, widget.max or 0.0, whole)
    return found


def varied_setting(name: str, text: str, model: ModelPatcher) -> VariedSetting | None:
    """The setting in ``text`` of the input ``name``, for the blend of ``model``; None if the text is empty."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        raise ValueError(f"{name} names {len(lines)} settings; keep one of them")
    labels = [expert.label for expert in chain_of(model).experts]
    return read_setting(lines[0], labels, widget_limits()) if lines else None


@checks_inputs
class BlendGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendGrid",
            display_name="Blend Grid",
            category="chorus",
            description="A contact sheet of a blend over the values of one or two settings, with the same noise.",
            search_aliases=["MagicFusion", "XY plot", "compare blend settings", "grid", "chorus"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A blended model, from Saliency Noise Blend. Chains of several are possible."
                ),
                io.Conditioning.Input("positive", tooltip="As in KSampler."),
                io.Conditioning.Input("negative", tooltip="As in KSampler."),
                io.Latent.Input("latent_image", tooltip="An empty latent of one image or video."),
                io.Vae.Input("vae", tooltip="The VAE of the blended models."),
                io.String.Input(
                    "rows",
                    default="bias = -1 | 0 | 1",
                    tooltip="A setting with its values, for the rows: bias = -1 | 0 | 1, or: bias = -1 to 1 by 0.5."
                    f" Settings that can vary: {', '.join(NAMES)}.",
                ),
                io.String.Input(
                    "columns",
                    default="start_percent = 0 | 0.1 | 0.2",
                    tooltip="A setting with its values, for the columns. Empty: only rows.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="As in KSampler. All images have the noise of this seed.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="As in KSampler."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="As in KSampler."),
                io.Combo.Input("sampler_name", options=SAMPLER_NAMES, default="euler", tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=SCHEDULER_NAMES, default="normal", tooltip="As in KSampler."),
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
        varied = varied_setting("rows", rows, model), varied_setting("columns", columns, model)
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
        return io.NodeOutput(*make_grid(model, *varied, inputs, vae))


NODES: list[type[io.ComfyNode]] = [BlendGrid]
