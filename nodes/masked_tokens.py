"""Masked token sampling (aMUSEd, arXiv 2401.01808) as a node."""

from comfy_api.latest import io
from torch import Tensor

from ..host.attachments import Conditioning
from ..techniques.masked_tokens.canvas import Request, rgb
from ..techniques.masked_tokens.comfy_model import MaskedTokenModel
from ..techniques.masked_tokens.comfy_run import sample_masked_tokens
from ..techniques.masked_tokens.decode import (
    ORDERS,
    RAMPS,
    SCHEDULES,
    MaskedTokenSettings,
    guidance_scales,
)
from ..techniques.masked_tokens.tokens import Tokens
from .checked_inputs import checks_inputs
from .sockets import MaskedTokenModelSocket, TokensSocket, blank


@checks_inputs
class MaskedTokenSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskedTokenSampler",
            display_name="Masked Token Sampler",
            category="chorus",
            description=(
                "Paints by filling in tokens: all unknown ones are predicted at once, the most confident stay, the rest"
                " is asked again (aMUSEd). Text to image, image to image, in- and outpainting, drafts with fixed parts."
            ),
            search_aliases=["aMUSEd", "MaskGIT", "Muse", "masked image model", "inpaint tokens"],
            inputs=[
                MaskedTokenModelSocket.Input("model", tooltip="From Load Masked Token Model."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt, encoded with the clip of the model's loader. Several prompts (Conditioning"
                    " Combine) give one picture each.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What guidance leads away from; the authors use an empty prompt. Needed unless cfg is 1.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Sample i of a batch is the one of seed + i.",
                ),
                io.Int.Input(
                    "steps",
                    default=12,
                    min=1,
                    max=1000,
                    tooltip="Forward passes over the whole picture. The authors use 12. Useful: 8 to 20.",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance scale. 0: the model's own (4 for amused-256, 10 for amused-512). 1: no guidance,"
                    " half the cost.",
                ),
                io.Float.Input(
                    "temperature",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Noise on the confidence, falling to 0: which tokens stay, never what they become. Only for"
                    " the order confidence. Useful: 0 to 4.",
                ),
                io.Int.Input(
                    "width",
                    default=256,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip="In pixels. Ignored when an image or tokens are wired: those have a size.",
                ),
                io.Int.Input(
                    "height",
                    default=256,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip="In pixels. Ignored when an image or tokens are wired: those have a size.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, tooltip="Pictures of each prompt, image or draft."
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps that run, and with it of the tokens that are masked at first: 0.5 masks"
                    " 71 %. 1 masks all: nothing of the image is left where it is painted. 0 leaves an image as it is.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default="confidence",
                    tooltip="Which tokens stay first. confidence: those that the model is surest of (the paper)."
                    " halton: evenly spread over the picture. random: any.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="cosine",
                    tooltip="How fast tokens are filled in. cosine: few at first (the paper). linear: equally many; the"
                    " authors' code inpaints with it.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture to repaint: with a mask only there, else all of it as far as denoise says. Its"
                    " alpha is not read.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where to paint, as large as the image: every token that it touches with at least 0.5. The"
                    " image's pixels where it is 0 come back bit for bit. With tokens alone: which of them to paint anew.",
                ),
                TokensSocket.Input(
                    "tokens",
                    optional=True,
                    tooltip="Tokens that hold, whatever seed and denoise say; unknown ones are painted. With an image:"
                    " they replace its tokens, under the mask if there is one.",
                ),
                io.Float.Input(
                    "aesthetic_score",
                    default=6.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="What the model was told of its training pictures, 6 as the authors have it. Useful: 4 to 7.",
                ),
                io.Combo.Input(
                    "cfg_ramp",
                    options=list(RAMPS),
                    default="constant",
                    advanced=True,
                    tooltip="How cfg runs over the steps: as it is, rising from near 1 (Muse), which varies more, or"
                    " falling to near 1.",
                ),
                io.Int.Input(
                    "feather",
                    default=8,
                    min=0,
                    max=512,
                    advanced=True,
                    tooltip="Width in pixels of the soft seam, inside the mask. 0: a hard edge, as outpainting wants it: the seam mixes"
                    " in what the image shows there.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                TokensSocket.Output("tokens", display_name="tokens", tooltip="To keep, edit or sample on with."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: MaskedTokenModel,
        positive: Conditioning,
        seed: int,
        steps: int,
        cfg: float,
        temperature: float,
        width: int,
        height: int,
        batch_size: int,
        denoise: float,
        order: str,
        schedule: str,
        aesthetic_score: float,
        cfg_ramp: str = "constant",
        feather: int = 8,
        negative: Conditioning | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        tokens: Tokens | None = None,
    ) -> io.NodeOutput:
        own = blank(model)
        settings = MaskedTokenSettings(model.codebook, model.mask_id, steps, denoise, temperature, order, schedule)
        request = Request(
            own,
            (height, width),
            picture=None if image is None else rgb(image),
            mask=None if mask is None else mask.reshape(-1, *mask.shape[-2:]),
            tokens=tokens,
        )
        pictures, ids = sample_masked_tokens(
            model,
            request,
            settings,
            positive,
            negative,
            scales=guidance_scales(cfg or model.cfg, steps, cfg_ramp),
            batch_size=batch_size,
            seed=seed,
            aesthetic_score=aesthetic_score,
            feather=feather,
        )
        return io.NodeOutput(pictures, own.with_ids(ids))


NODES: list[type[io.ComfyNode]] = [MaskedTokenSampler]
