"""SaliencyNoiseBlend and its view: several checkpoints paint one image (MagicFusion, arXiv 2303.13126)."""

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ..host.attachments import Conditioning
from ..techniques.saliency_blend.blend import JointSettings
from ..techniques.saliency_blend.comfy_experts import Expert
from ..techniques.saliency_blend.comfy_hook import add_expert, blend_chain
from ..techniques.saliency_blend.experts import ExpertSettings
from ..techniques.saliency_blend.trace import BlendTrace
from ..techniques.saliency_blend.view import draw_blend
from .checked_inputs import checks_inputs
from .sockets import BlendTraceSocket


@checks_inputs
class SaliencyNoiseBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaliencyNoiseBlend",
            display_name="Saliency Noise Blend",
            category="chorus",
            description=(
                "Lets a second checkpoint paint where its guidance is strongest, step by step, inside any sampler"
                " (MagicFusion). Chain several for more experts."
            ),
            search_aliases=["MagicFusion", "SNB", "model fusion", "blend checkpoints"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base (general) model, or one that already carries a blend: then one more expert joins."
                    " A LoRA put after this node changes the base only.",
                ),
                io.Model.Input(
                    "expert", tooltip="The expert. Its own LoRAs, patches, hooks and ControlNets act on it alone."
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="The expert's prompt. Not wired: the sampler's, read anew."
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The expert's negative prompt. Not wired: the sampler's, read anew.",
                ),
                io.Float.Input(
                    "expert_strength",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="k_e of the paper. Larger: fewer, sharper positions. 0 switches the expert off. Useful: 0.5 to 10.",
                ),
                io.Float.Input(
                    "bias",
                    default=0.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Added to the expert's log score. Larger: more area. Useful: -1 to 1.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Sampling percent from which the expert takes part. Outside its window it costs nothing.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Sampling percent at which the expert leaves. 0.4 lets the base finish the details alone.",
                ),
                io.Combo.Input(
                    "ramp",
                    options=["constant", "rising", "falling"],
                    default="constant",
                    tooltip="How bias runs over the window: as it is, from 0 up to it, or from it down to 0.",
                ),
                io.Float.Input(
                    "expert_cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="The expert's own guidance scale. 0: the sampler's.",
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="Where the expert may paint: its logarithm joins the score, 1 is neutral, 0 never."
                    " Any saliency map can be wired here.",
                ),
                io.Combo.Input(
                    "region_mode",
                    options=["compete", "force"],
                    default="compete",
                    tooltip="compete: saliency decides inside the region. force: the expert paints exactly where the"
                    " region is at least 0.5.",
                ),
                io.Int.Input(
                    "refresh",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Run the expert in every n-th interval of the steps only, and extrapolate its difference to"
                    " the base in between. 1 is exact; 2 nearly halves the expert's cost.",
                ),
                io.String.Input("label", default="", tooltip="The expert's name in the trace and in errors."),
                io.Float.Input(
                    "general_strength",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="k_g of the paper, for the base. The last node of a chain decides for all.",
                ),
                io.Combo.Input(
                    "mask_mode",
                    options=["hard", "soft"],
                    default="hard",
                    tooltip="hard: one model per position, as in the paper. soft: a weighted mean."
                    " The last node of a chain decides for all.",
                ),
                io.Float.Input(
                    "softness",
                    default=1.0,
                    min=0.001,
                    max=100.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Temperature of the soft mask; small is nearly hard. The last node of a chain decides.",
                ),
                io.Combo.Input(
                    "saliency",
                    options=["own", "shared"],
                    default="own",
                    advanced=True,
                    tooltip="own: each model against its own negative (the paper). shared: all against the base's, times"
                    " cfg (the authors' code). The last node of a chain decides.",
                ),
                io.Int.Input(
                    "blur",
                    default=4,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Side of the smoothing box in latent positions; 1 smooths nothing. The last node of a chain decides.",
                ),
                # optional: workflows saved before they existed stay valid
                io.Float.Input(
                    "skip_below",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Leave for the rest of the run when the expert's share of the mask has stayed under this for"
                    " three steps. 0: never. Useful: 0.02 to 0.1.",
                ),
                io.Int.Input(
                    "crop_margin",
                    optional=True,
                    default=0,
                    min=0,
                    max=256,
                    advanced=True,
                    tooltip="Evaluate the expert only on the box around its region, or around where it painted last,"
                    " with this margin in latent positions. Outside the box the base paints. 0: off. Useful: 8 to 16.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model"),
                BlendTraceSocket.Output(
                    "trace", display_name="trace", tooltip="Who painted where, for Saliency Blend View."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        expert: ModelPatcher,
        expert_strength: float,
        bias: float,
        start_percent: float,
        end_percent: float,
        ramp: str,
        expert_cfg: float,
        region_mode: str,
        refresh: int,
        label: str,
        general_strength: float,
        mask_mode: str,
        softness: float,
        saliency: str,
        blur: int,
        positive: Conditioning | None = None,
        negative: Conditioning | None = None,
        region: Tensor | None = None,
        skip_below: float = 0.0,
        crop_margin: int = 0,
    ) -> io.NodeOutput:
        settings = ExpertSettings(
            label=label.strip() or f"expert {len(blend_chain(model).experts) + 1}",
            strength=expert_strength,
            bias=bias,
            start_percent=start_percent,
            end_percent=end_percent,
            ramp=ramp,
            expert_cfg=expert_cfg,
            region=region,
            region_mode=region_mode,
            refresh=refresh,
            skip_below=skip_below,
            crop_margin=crop_margin,
        )
        joint = JointSettings(general_strength, mask_mode, softness, saliency, blur)
        trace = BlendTrace()

        blended = add_expert(model, Expert(expert, positive, negative, settings, trace), joint)
        return io.NodeOutput(blended, trace)


@checks_inputs
class SaliencyBlendView(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaliencyBlendView",
            display_name="Saliency Blend View",
            category="chorus",
            description="Shows who painted where in the last run of a blended model: every step, the mean, the shares.",
            is_output_node=True,
            inputs=[
                BlendTraceSocket.Input("trace", tooltip="From Saliency Noise Blend."),
                io.Latent.Input("samples", tooltip="The sampler's latent; makes this node wait for it."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                io.Mask.Output("mask", display_name="mask", tooltip="Mean share of all experts over the run."),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, trace: BlendTrace, samples: dict[str, Any]) -> io.NodeOutput:
        record = trace.record
        if record is None:
            raise ValueError(
                "this blend has no finished run to show: sample with the model of the same node,"
                " and wire that sampler's latent into 'samples'"
            )
        report = record.report()
        if not record.belongs_to(samples["samples"]):
            report = (
                "The wired samples are not from the run shown here: the sampler was answered from cache or resampled.\n"
                + report
            )
        image, mask = draw_blend(record)
        return io.NodeOutput(image, mask, report, ui=ui.PreviewImage(image, cls=cls))


NODES: list[type[io.ComfyNode]] = [SaliencyNoiseBlend, SaliencyBlendView]
