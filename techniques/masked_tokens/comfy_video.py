"""Videos with a masked token model under ComfyUI: generated from a motion, or edited.

Shapes: T frames, h and w the height and width in tokens, H and W those in pixels.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_management
import torch
from torch import Tensor

from ...common.masks import check_count
from ...host.attachments import Conditioning
from .batch import stack_texts
from .canvas import InitialTokens, check_sides
from .comfy_model import MaskedTokenModel
from .comfy_run import MaskedTokenRun, decode_tokens, encode_images, micro, read_texts
from .decode import MaskedTokenSettings, decode, draw_uniforms, guided, sample_seed
from .networks.uvit_blocks import KeyValue
from .tokens import check_mask, mask_to_tokens
from .video import AGREEMENT, followed, moved, offsets

InterruptProcessingException = comfy.model_management.InterruptProcessingException


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """Settings of every frame; for ``boundary`` see ``video.moved`` and ``video.followed``."""

    decoding: MaskedTokenSettings
    cfg: float
    seed: int
    boundary: int = 0
    reference_frames: int = 0  # 0: none; 1: the first; 2: the first and the previous
    tolerance: float = AGREEMENT


@dataclass
class Video:
    """The finished frames of a run."""

    source: Tensor  # the tokens that were given: [1, h, w] of the first frame, or [T, h, w] of the video to edit
    total: int
    frames: list[Tensor] = field(default_factory=list)  # tokens [h, w] of each
    generated: list[int] = field(default_factory=list)  # the number of tokens generated in each
    interrupted: bool = False

    @property
    def ids(self) -> Tensor:
        return torch.stack(self.frames)


class VideoRun:
    """Generates the frames of one video after another.

    Memory does not grow with the number of frames, except for their tokens: only the keys and values of the first and the
    previous frame are kept.
    """

    def __init__(
        self,
        model: MaskedTokenModel,
        positive: Conditioning,
        negative: Conditioning | None,
        settings: VideoSettings,
        area: tuple[int, int],
        aesthetic_score: float = 6.0,
    ) -> None:
        texts = read_texts(model, positive, negative, [settings.cfg])
        for name, prompts in zip(("positive", "negative"), texts):
            if len(prompts) > 1:
                raise ValueError(
                    f"{name}: expected one prompt for the whole video, got {len(prompts)}; use one Masked Token Video for"
                    " each prompt"
                )
        self.model, self.settings = model, settings
        self.run = MaskedTokenRun(model, stack_texts(*texts), micro(area, aesthetic_score))
        self.guided = guided(self.run.cond, self.run.both, [settings.cfg] * settings.decoding.steps)
        self.first: list[KeyValue] | None = None  # keys and values of the first frame
        self.unread: list[Tensor] = []  # tokens of the reference frames whose keys and values are not computed yet

    def generate(self, first: Tensor, frames: int, dx: float, dy: float, moving: Tensor | None) -> Video:
        """A video of ``frames`` frames that begins with ``first`` [h, w] and moves by ``dx``, ``dy`` pixels per frame.

        Unknown tokens of ``first`` are generated. ``moving`` bool [h, w]: the tokens that move; None: all. Frame t uses the
        seed ``seed + t``, so that the first frame is that of Masked Token Sampler.
        """
        motion = offsets(frames, dx, dy, self.model.downscale)

        def make(t: int, previous: Tensor | None) -> tuple[Tensor, int]:
            nonlocal moving
            start = first
            if previous is not None:
                start, moving = moved(previous, motion[t - 1], self.model.mask_id, self.settings.boundary, moving)
            ids = self._decode(start, sample_seed(self.settings.seed, t), t, frames, pinned=start)
            return ids, int((start == self.model.mask_id).sum())

        return self._frames(Video(first[None], frames), make)

    def edit(self, source: Tensor, free: Tensor | None) -> Video:
        """The video of the tokens ``source`` [T, h, w], edited by the prompt where ``free`` bool [T, h, w] is true.

        The first frame is edited as Masked Token Sampler edits an image; the tokens of all others follow it (see
        ``video.followed``) and are edited where they cannot. All frames use the same seed.
        """
        mask_id = self.model.mask_id
        follow = functools.partial(
            followed,
            codes=self.model.vq.model.quantize.embedding.weight.detach().float().cpu(),
            mask_id=mask_id,
            tolerance=self.settings.tolerance,
            boundary=self.settings.boundary,
        )

        def make(t: int, previous: Tensor | None) -> tuple[Tensor, int]:
            mask = torch.ones_like(source[t], dtype=torch.bool) if free is None else free[t]
            pinned = torch.full_like(source[t], mask_id)
            if previous is not None:
                pinned = follow(previous, source[t - 1], source[t]).masked_fill(~mask, mask_id)
            ids = self._decode(source[t], self.settings.seed, t, len(source), mask=mask, pinned=pinned)
            return ids, int((mask & (pinned == mask_id)).sum())

        return self._frames(Video(source, len(source)), make)

    def _frames(self, video: Video, make: Callable[[int, Tensor | None], tuple[Tensor, int]]) -> Video:
        """``video`` with the frames of ``make(t, previous)``, each with the number of its generated tokens.

        If the user interrupts the run, the finished frames remain; without any, the exception is raised.
        """
        try:
            for t in range(video.total):
                ids, generated = make(t, video.frames[-1] if video.frames else None)
                video.frames.append(ids)
                video.generated.append(generated)
                if self.settings.reference_frames > (t > 0):  # the first frame stays, the last one is replaced
                    self.unread = [*self.unread[: self.first is None], ids]
        except InterruptProcessingException:
            if not video.frames:
                raise
            video.interrupted = True
        return video

    def _tokens_to_logits(self, ids: Tensor, step: int) -> Tensor:
        # keys and values are computed only now, because frames in which nothing is new need none
        keys = [self.run.keys_values(frame[None].to(self.run.device)) for frame in self.unread]
        self.unread = []
        if keys and self.first is None:
            self.run.references = self.first = keys.pop(0)
        for other in keys:
            assert self.first is not None
            self.run.references = [one.joined(two) for one, two in zip(self.first, other)]
        return self.guided(ids, step)

    def _decode(
        self, ids: Tensor, seed: int, frame: int, frames: int, *, pinned: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        def progress(done: int, total: int, now: Tensor, predicted: Tensor) -> None:
            # every frame has the same share of the bar, however many of its steps are skipped
            steps = self.settings.decoding.steps
            self.run.progress(frame * steps + done * steps // total, frames * steps, now, predicted)

        return decode(
            ids[None].to(self.run.device),
            self._tokens_to_logits,
            self.settings.decoding,
            draw_uniforms(seed, 1, *ids.shape, self.settings.decoding.steps),
            mask=None if mask is None else mask[None],
            pinned=pinned[None],
            progress=progress,
        )[0].cpu()


@dataclass(frozen=True, eq=False)
class VideoRequest:
    """The user's inputs; sizes and motions in pixels."""

    area: tuple[int, int]  # height and width of the frames
    downscale: int  # pixels along one side of a token
    frames: int  # of a generated video
    dx: float
    dy: float
    images: Tensor | None = None  # [1, H, W, 3]: the first frame; [T, H, W, 3]: the video to edit; 0..1
    mask: Tensor | None = None  # [1 or T, H, W]
    feather: int = 0

    def __post_init__(self) -> None:
        check_sides("width and height" if self.images is None else "the images", self.area, self.downscale)
        if self.mask is not None:
            check_mask(self.mask, self.area)
            check_count(len(self.mask), len(self.images) if self.images is not None and self.edits else 1)

    @property
    def edits(self) -> bool:
        """Whether ``images`` is a video to edit."""
        return self.images is not None and len(self.images) > 1

    @property
    def notes(self) -> list[str]:
        """Lines for the report about a generated video: unused inputs, and steps in which nothing moves."""
        if self.edits:
            return []
        lines = []
        if self.images is not None:
            lines.append(
                "1 image: it is the first frame, which dx and dy move; strength is not used; connect several images to edit"
                " a video"
            )
        motion = offsets(self.frames, self.dx, self.dy, self.downscale)
        if (still := motion.count((0, 0))) and (self.dx or self.dy):
            lines.append(
                f"dx {self.dx:g} and dy {self.dy:g} move nothing in {still} of {len(motion)} steps from frame to frame, since"
                f" positions are rounded to whole tokens of {self.downscale} pixels; use multiples of {self.downscale}"
            )
        return lines


def make_video(
    model: MaskedTokenModel,
    positive: Conditioning,
    negative: Conditioning | None,
    settings: VideoSettings,
    request: VideoRequest,
) -> tuple[Video, Tensor]:
    """The finished frames of a generated or edited video, and their images [T, H, W, 3] with values 0..1.

    In an edited video, pixels outside the mask and frames without a changed token are those of the input, bit for bit. So
    are the frames of a generated video in which nothing moves.
    """
    video = _tokens(model, VideoRun(model, positive, negative, settings, request.area), request)
    try:
        return video, _pictures(model, video, request)
    except InterruptProcessingException:
        if video.interrupted:
            raise
        # a single interrupt keeps the finished frames, also while they are decoded
        video.interrupted = True
        return video, _pictures(model, video, request)


def _tokens(model: MaskedTokenModel, run: VideoRun, request: VideoRequest) -> Video:
    free = None if request.mask is None else mask_to_tokens(request.mask, request.downscale).cpu()
    if request.images is not None and request.edits:
        source = encode_images(model, request.images)
        return run.edit(source, None if free is None else free.expand(len(source), -1, -1))
    if request.images is not None:
        first = encode_images(model, request.images)[0]
    else:
        first = torch.full([side // request.downscale for side in request.area], model.mask_id)
    return run.generate(first, request.frames, request.dx, request.dy, None if free is None else free[0])


def _pictures(model: MaskedTokenModel, video: Video, request: VideoRequest) -> Tensor:
    images, count = request.images, len(video.frames)
    if images is None:
        return decode_tokens(model, video.ids)
    if request.edits:
        mask = None if request.mask is None else request.mask.expand(len(images), -1, -1)[:count]
        initial = InitialTokens(video.source[:count], None, None, images[:count], mask)
        return initial.finish(video.ids, lambda ids: decode_tokens(model, ids), request.feather)
    if torch.equal(video.ids, video.source.expand_as(video.ids)):  # nothing moved
        return images.expand(count, -1, -1, -1).contiguous()
    # the first frame is decoded too, because the others would have less detail
    return decode_tokens(model, video.ids)
