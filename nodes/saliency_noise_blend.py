"""SaliencyNoiseBlend and its view: several checkpoints generate one image (MagicFusion, arXiv 2303.13126)."""

import math
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ..host.attachments import Conditioning
from ..techniques.saliency_blend.blend import JointSettings
from ..techniques.saliency_blend.comfy_experts import Expert
from ..techniques.saliency_blend.comfy_hook import add_expert, blend_chain
from ..techniques.saliency_blend.comfy_layout import as_image
from ..techniques.saliency_blend.experts import ExpertSettings
from ..techniques.saliency_blend.trace import BlendTrace
from ..techniques.saliency_blend.view import NO_BLEND, draw_blend, draw_no_blend
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
                "Blends a second checkpoint, the expert, into an image: at every step of any sampler, the expert"
                " generates the positions where its guidance is strongest (MagicFusion). Chain several nodes for more"
                " experts."
            ),
            search_aliases=[
                "MagicFusion",
                "SNB",
                "model fusion",
                "blend checkpoints",
                "merge checkpoints per step",
                "mix models",
                "mix checkpoints",
                "merge models",
                "combine models",
                "chorus",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model, or a blended model, to which this node adds one more expert."
                    " A LoRA after this node changes the base only.",
                ),
                io.Model.Input(
                    "expert", tooltip="The expert. Its LoRAs, patches, hooks and ControlNets affect only the expert."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The expert's prompt. If it is not connected, the sampler's prompt is used.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The expert's negative prompt. If it is not connected, the sampler's negative prompt is"
                    " used.",
                ),
                io.Float.Input(
                    "expert_strength",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Contrast of the expert's saliency (k_e of the paper). It hardly changes the expert's"
                    " area; use bias or expert_share for that. 0 switches the expert off.",
                ),
                io.Float.Input(
                    "bias",
                    default=0.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Values above 0 give the expert more area, values below 0 less. The unit is the spread"
                    " (standard deviation) of the expert's lead over the base. 0 is the paper's method. Measured: an"
                    " expert that gets half of the image at 0 gets about 70 % at 0.5, about 30 % at -0.5, nearly all"
                    " at 3 and nearly nothing at -3.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Sampling percent at which the expert starts. Before start_percent and after end_percent"
                    " it costs nothing.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Sampling percent at which the expert stops. At 0.4 only the base generates the details.",
                ),
                io.Combo.Input(
                    "ramp",
                    options=["constant", "rising", "falling"],
                    default="constant",
                    tooltip="How bias and expert_share change from start_percent to end_percent. constant: not at"
                    " all. rising: from 0 to their values. falling: from their values to 0.",
                ),
                io.Float.Input(
                    "expert_cfg",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="The expert's own guidance scale. 0 uses the sampler's scale.",
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="Mask of where the expert may generate: 1 has no effect, 0 excludes the expert, and"
                    " values in between weaken the expert. Measured: the expert keeps about 9 tenths of its area at"
                    " 0.9, about half at 0.5 and almost nothing at 0.1. Any saliency map can be connected.",
                ),
                io.Combo.Input(
                    "region_mode",
                    options=["compete", "force"],
                    default="compete",
                    tooltip="compete: saliency decides inside the region. force: the expert generates exactly the"
                    " positions where the region is at least 0.5.",
                ),
                io.Int.Input(
                    "refresh",
                    default=1,
                    min=1,
                    max=20,
                    tooltip="Evaluate the expert at every n-th step only, and extrapolate its difference from the"
                    " base in between. 1 is exact; 2 nearly halves the expert's cost.",
                ),
                io.String.Input("label", default="", tooltip="The expert's name in the view and in error messages."),
                io.Float.Input(
                    "general_strength",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Contrast of the base's saliency (k_g of the paper). The value of the last node in a"
                    " chain is used.",
                ),
                io.Combo.Input(
                    "mask_mode",
                    options=["hard", "soft"],
                    default="hard",
                    tooltip="hard: one model generates each position, as in the paper. soft: a weighted mean of all"
                    " models. The value of the last node in a chain is used.",
                ),
                io.Float.Input(
                    "softness",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Width of the transition in a soft mask, in the unit of bias: 0 is the hard mask, 0.3 has"
                    " narrow borders, 1 mixes the models nearly everywhere. The value of the last node in a chain is"
                    " used.",
                ),
                io.Combo.Input(
                    "saliency",
                    options=["own", "shared"],
                    default="own",
                    advanced=True,
                    tooltip="The prediction that each model's positive prediction is compared with. own: the model's"
                    " own negative prediction, as in the paper. shared: the base's negative prediction, with the"
                    " difference multiplied by cfg, as in the authors' code. The value of the last node in a chain is"
                    " used.",
                ),
                io.Int.Input(
                    "blur",
                    default=4,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Side of the box that smooths the saliency, in latent positions. 1 switches smoothing off."
                    " The value of the last node in a chain is used.",
                ),
                # these inputs are optional, so that workflows saved before they existed stay valid
                io.Float.Input(
                    "skip_below",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    advanced=True,
                    tooltip="Skip the expert for the rest of the run once its share of the mask has been below this for"
                    " three steps. The decision is made for each image of a batch separately. 0: never. Useful: 0.02 to"
                    " 0.1.",
                ),
                io.Int.Input(
                    "crop_margin",
                    optional=True,
                    default=0,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="Evaluate the expert only inside a box with this margin, in latent positions. The box is"
                    " around the expert's region, or around its last mask if it has no region. Outside the box the base"
                    " generates. The images of a batch share one box. 0: off. Useful: 8 to 16.",
                ),
                io.Float.Input(
                    "expert_share",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the image that the expert gets at every step. If the expert has a region, it is"
                    " the part of that region. The expert gets the positions where it leads the base most. 0: bias"
                    " decides. In a chain the first expert takes its part first.",
                ),
                io.Float.Input(
                    "mask_momentum",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    advanced=True,
                    tooltip="Weight of the earlier steps' saliency in the mask. 0 is the paper's method; 0.8 averages"
                    " over about five steps, which makes masks steadier. The value of the last node in a chain is"
                    " used.",
                ),
                io.Int.Input(
                    "mask_refresh",
                    optional=True,
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Compute the mask at every n-th step only, and use it again in between. 100 keeps the first"
                    " mask for up to 100 steps, which helps if the masks jump from step to step. Steps with a kept mask"
                    " evaluate only models that generate some part of the image. At cfg 1 they need no negative, which"
                    " halves their cost. Useful: 100; or 2 to 4 at cfg 1. The value of the last node in a chain is used.",
                ),
                io.Float.Input(
                    "temporal_smoothing",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=4.0,
                    step=0.1,
                    advanced=True,
                    tooltip="For videos: smooths the saliency over the frames, so that masks flicker less. It is a"
                    " standard deviation in latent frames. 0: each frame alone. Useful: 0.5. The value of the last node"
                    " in a chain is used.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model"),
                BlendTraceSocket.Output(
                    "trace", display_name="trace", tooltip="The masks of the last run, for Saliency Blend View."
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
        expert_share: float = 0.0,
        mask_momentum: float = 0.0,
        mask_refresh: int = 1,
        temporal_smoothing: float = 0.0,
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
            expert_share=expert_share,
        )
        joint = JointSettings(
            general_strength, mask_mode, softness, saliency, blur, mask_momentum, mask_refresh, temporal_smoothing
        )
        trace = BlendTrace()

        blended = add_expert(model, Expert(expert, positive, negative, settings, trace), joint)
        return io.NodeOutput(blended, trace)


NO_SAMPLES = "samples is not connected; connect the sampler's latent"
NOT_THIS_RUN = (
    "The samples are not from the run shown here: the sampler's result came from the cache, or was sampled again, or the"
    " sampler uses another model than the blend; connect the MODEL of Saliency Noise Blend to the sampler."
)
# marks an input that is not connected, in validate_inputs: there ComfyUI passes None for a connected input, because
# its value is not known yet
UNCONNECTED = object()


@checks_inputs
class SaliencyBlendView(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaliencyBlendView",
            display_name="Saliency Blend View",
            category="chorus",
            description="Shows the masks of the last run of a blended model: the mask of every step, their mean, and"
            " each model's share.",
            search_aliases=["MagicFusion", "blend masks", "which model generates where", "preview masks", "chorus"],
            is_output_node=True,
            inputs=[
                # ``trace`` is optional, because the page drops the link of a bypassed node. ``samples`` is optional,
                # too, because the page shows required sockets first, and the order of sockets must not change.
                BlendTraceSocket.Input(
                    "trace",
                    optional=True,
                    tooltip="From Saliency Noise Blend. While that node is bypassed, the image shows why there are no"
                    " masks.",
                ),
                io.Latent.Input(
                    "samples",
                    optional=True,
                    tooltip="The sampler's latent. It must be connected, so that this node runs after the sampler.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                io.Mask.Output("mask", display_name="mask", tooltip="Mean share of all experts over the run."),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def validate_inputs(cls, trace: Any = None, samples: Any = UNCONNECTED) -> bool:
        # raised, because ComfyUI would begin a returned message with the name of the first connected input, which is trace
        if samples is UNCONNECTED:
            raise ValueError(NO_SAMPLES)
        return True

    @classmethod
    def execute(cls, trace: BlendTrace | None = None, samples: dict[str, Any] | None = None) -> io.NodeOutput:
        if samples is None:
            raise ValueError(NO_SAMPLES)
        latent = samples["samples"]
        if latent.is_nested:  # a video with audio; the blend generates the video
            latent = latent.unbind()[0]
        latent = as_image(latent)
        if trace is None:
            image = draw_no_blend(len(latent))
            nowhere = torch.zeros(len(latent) * math.prod(latent.shape[2:-2]), *latent.shape[-2:])
            return io.NodeOutput(image, nowhere, "\n".join(NO_BLEND), ui=ui.PreviewImage(image, cls=cls))
        record = trace.record
        if record is None:
            raise ValueError(
                "trace holds no finished run: sample with the model of the same Saliency Noise Blend, and connect that"
                " sampler's latent to 'samples'"
            )
        report = record.report()
        if not record.belongs_to(latent):
            report = f"{NOT_THIS_RUN}\n{report}"
        image, mask = draw_blend(record)
        return io.NodeOutput(image, mask, report, ui=ui.PreviewImage(image, cls=cls))


NODES: list[type[io.ComfyNode]] = [SaliencyNoiseBlend, SaliencyBlendView]
