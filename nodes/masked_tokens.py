"""MaskedTokenSampler: generates, inpaints and edits images as tokens (aMUSEd, arXiv 2401.01808)."""

from comfy_api.latest import io
from torch import Tensor

from ..common.masks import connected
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
    sample_seed,
)
from ..techniques.masked_tokens.tokens import Tokens
from . import masked_token_widgets as widgets
from .checked_inputs import checks_inputs
from .sockets import TokensSocket, blank


@checks_inputs
class MaskedTokenSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskedTokenSampler",
            display_name="Masked Token Sampler",
            category="chorus",
            description=(
                "Generates images as tokens: each step predicts all unknown tokens at once, keeps the most confident"
                " predictions and masks the rest again (aMUSEd). For text to image, image to image, inpainting, outpainting, and"
                " new versions of an image with some tokens fixed."
            ),
            search_aliases=[
                "aMUSEd",
                "MaskGIT",
                "Muse",
                "masked image model",
                "inpaint tokens",
                "token sampler",
                "chorus",
            ],
            inputs=[
                widgets.model(),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt, encoded with the clip of Load Masked Token Model. Several prompts"
                    " (Conditioning Combine) give one image each.",
                ),
                widgets.negative(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Sample i of a batch uses seed + i.",
                ),
                widgets.steps("Forward passes of the model. The authors use 12. Useful: 8 to 20."),
                widgets.cfg(),
                io.Float.Input(
                    "temperature",
                    default=2.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Noise added to the confidence; it falls to 0 over the steps. It changes which tokens are"
                    " kept first, not how they are sampled. Used only if order is set to confidence. Useful: 0 to 4.",
                ),
                widgets.side(
                    "width", "Width in pixels. If an image or tokens are connected, their width is used instead."
                ),
                widgets.side(
                    "height", "Height in pixels. If an image or tokens are connected, their height is used instead."
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, tooltip="Images per prompt, input image or token grid."
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps that run. It also sets how many tokens are masked initially: 0.5 masks"
                    " 71 % with schedule cosine, 50 % with linear. 1 masks all, so nothing of the image is kept under"
                    " the mask. 0 returns the image unchanged.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default="confidence",
                    tooltip="Which tokens are kept first. confidence: the most confident predictions (the paper)."
                    " halton: evenly spread over the image. random: in random order.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="cosine",
                    tooltip="How many tokens each step generates. cosine: few at first (the paper). linear: the same"
                    " number in every step, as in the authors' inpainting code.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Image to inpaint under the mask. Without a mask, the whole image can change, and a higher"
                    " denoise changes more of it. Alpha is ignored.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The area to generate; same size as the image. A token is generated if any of its mask"
                    " pixels is at least 0.5. Where the mask is 0, the image's pixels are returned bit for bit. With"
                    " tokens and no image: the tokens under the mask are generated again.",
                ),
                TokensSocket.Input(
                    "tokens",
                    optional=True,
                    tooltip="Tokens that stay fixed for any seed and denoise; unknown tokens are generated. With an"
                    " image: these tokens replace the image's tokens. With an image and a mask: only at positions under"
                    " the mask.",
                ),
                io.Float.Input(
                    "aesthetic_score",
                    default=6.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Aesthetic score that the model is conditioned on, 6 in the authors' code. Useful: 4 to 7.",
                ),
                io.Combo.Input(
                    "cfg_ramp",
                    options=list(RAMPS),
                    default="constant",
                    advanced=True,
                    tooltip="cfg over the steps: constant, rising from near 1 (as in Muse; gives more variety), or"
                    " falling to near 1.",
                ),
                widgets.feather(
                    "Width in pixels of the soft edge inside the mask, where the image is mixed in. 0: a hard"
                    " edge. Use 0 for outpainting, because a soft edge would mix in the padding."
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                TokensSocket.Output(
                    "tokens", display_name="tokens", tooltip="To save, edit, or connect to another sampler."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The size and the seed of each image, and unused inputs."
                ),
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
        unknown = blank(model)
        image = None if image is None else rgb(image)
        size = None if tokens is None else tokens.size
        mask, notes = connected(mask, size if image is None else (image.shape[1], image.shape[2]))
        settings = MaskedTokenSettings(model.codebook, model.mask_id, steps, denoise, temperature, order, schedule)
        request = Request(
            unknown,
            (height, width),
            image=image,
            mask=mask,
            tokens=tokens,
        )
        images, ids = sample_masked_tokens(
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
        height, width = request.area
        seeds = [f"image {i + 1}: seed {sample_seed(seed, i)}" for i in range(len(ids))]
        size = [f"{model.name}: {width} x {height} pixels", *model.size_note(request.area)]
        report = "\n".join([*size, *notes, *request.notes, *seeds])
        return io.NodeOutput(images, unknown.with_ids(ids), report)


NODES: list[type[io.ComfyNode]] = [MaskedTokenSampler]
