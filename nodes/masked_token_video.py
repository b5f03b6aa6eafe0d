"""MaskedTokenVideo: generates or edits a video as tokens that move from frame to frame (aMUSEd, arXiv 2401.01808)."""

from comfy_api.latest import io
from torch import Tensor

from ..common.masks import connected
from ..host.attachments import Conditioning
from ..techniques.masked_tokens.canvas import rgb
from ..techniques.masked_tokens.comfy_model import MaskedTokenModel
from ..techniques.masked_tokens.comfy_video import VideoRequest, VideoSettings, make_video
from ..techniques.masked_tokens.decode import MaskedTokenSettings, sample_seed
from . import masked_token_widgets as widgets
from .checked_inputs import checks_inputs
from .sockets import TokensSocket, blank


@checks_inputs
class MaskedTokenVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskedTokenVideo",
            display_name="Masked Token Video",
            category="chorus",
            description=(
                "Generates or edits a video with an image model: the tokens of each frame move to the next, and only new"
                " tokens are generated. Without images, or with one image as the first frame, the motion is given by"
                " dx and dy. Several images are a video to edit, whose motion is found by comparing its tokens."
            ),
            search_aliases=["aMUSEd video", "zero-shot video", "Text2Video-Zero", "edit video", "pan", "chorus"],
            inputs=[
                widgets.model(),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt of the whole video, encoded with the clip of Load Masked Token Model.",
                ),
                widgets.negative(),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="One image: the first frame of the generated video. Several images: a video to edit.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Same size as the images. In a generated video: the part of the first frame that moves, over"
                    " the rest. In an edited video: the area that may change, one mask for all frames or one for each;"
                    " where the mask is 0, the pixels of the images are returned bit for bit.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the first frame. Each further frame of a generated video uses the next seed. All frames of an"
                    " edited video use the same seed.",
                ),
                widgets.steps(
                    "Forward passes of the model per frame. Frames with few new tokens need fewer. Useful: 8 to 20."
                ),
                widgets.cfg(),
                io.Int.Input(
                    "frames",
                    default=8,
                    min=1,
                    max=4096,
                    tooltip="Number of frames. Not used if several images are connected.",
                ),
                io.Float.Input(
                    "dx",
                    default=8.0,
                    min=-256.0,
                    max=256.0,
                    step=0.5,
                    tooltip="Motion to the right in pixels per frame; negative: to the left. Positions are rounded to"
                    " whole tokens, of 16 pixels for aMUSEd. Not used if several images are connected.",
                ),
                io.Float.Input(
                    "dy",
                    default=0.0,
                    min=-256.0,
                    max=256.0,
                    step=0.5,
                    tooltip="Motion downwards in pixels per frame; negative: upwards. Not used if several images are"
                    " connected.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much an edited video may change, as denoise of Masked Token Sampler. 0 returns the"
                    " images unchanged. Used only if several images are connected.",
                ),
                io.Int.Input(
                    "boundary",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Tokens around new ones that are generated again too, against visible seams. Useful: 0 or 1.",
                ),
                io.Int.Input(
                    "reference_frames",
                    default=0,
                    min=0,
                    max=2,
                    tooltip="Frames that the self-attention reads in addition. 0: none. 1: the first frame. 2: the first"
                    " and the previous frame. Each costs one more forward pass per frame.",
                ),
                widgets.side("width", "Width in pixels. If images are connected, their width is used instead."),
                widgets.side("height", "Height in pixels. If images are connected, their height is used instead."),
                widgets.feather("Width in pixels of the soft edge inside the mask of an edited video. 0: a hard edge."),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The frames."),
                TokensSocket.Output("tokens", display_name="tokens", tooltip="The tokens of each frame."),
                io.String.Output(
                    "report", display_name="report", tooltip="Generated tokens of each frame, and unused inputs."
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
        frames: int,
        dx: float,
        dy: float,
        strength: float,
        boundary: int,
        reference_frames: int,
        width: int,
        height: int,
        feather: int = 8,
        negative: Conditioning | None = None,
        images: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        images = None if images is None else rgb(images)
        area = (height, width) if images is None else (images.shape[1], images.shape[2])
        mask, notes = connected(mask, area)
        request = VideoRequest(area, model.downscale, frames, dx, dy, images, mask, feather)
        denoise = strength if request.edits else 1.0
        if denoise > 0.0 and int(steps * denoise) == 0:
            raise ValueError(
                f"strength {strength:g} of {steps} steps is less than one step; use a strength of at least"
                f" {1 / steps:.2g} or more steps"
            )
        video, pictures = make_video(
            model,
            positive,
            negative,
            VideoSettings(
                decoding=MaskedTokenSettings(model.codebook, model.mask_id, steps, denoise),
                cfg=cfg or model.cfg,
                seed=seed,
                boundary=boundary,
                reference_frames=reference_frames,
            ),
            request,
        )
        count = len(video.frames)
        lines = [f"{model.name}: {count} {'frame' if count == 1 else 'frames'} of {area[1]} x {area[0]} pixels"]
        lines += [*model.size_note(area), *request.notes, *notes]
        if video.interrupted:
            lines.insert(
                0,
                f"interrupted: {count} of {video.total} frames are finished; the node runs again only if an"
                " input changes",
            )
        if request.edits:
            lines.append(f"edited with seed {seed}; frames, dx and dy are not used")
        tokens = video.frames[0].numel()
        lines += [
            f"frame {t}: {generated} of {tokens} tokens may change"
            if request.edits
            else f"frame {t}: seed {sample_seed(seed, t - 1)}, {generated} of {tokens} tokens generated"
            for t, generated in enumerate(video.generated, start=1)
        ]
        return io.NodeOutput(pictures, blank(model).with_ids(video.ids), "\n".join(lines))


NODES: list[type[io.ComfyNode]] = [MaskedTokenVideo]
