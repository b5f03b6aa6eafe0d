"""The image-text encoder of the 64-pixel checkpoints: that of demo/emoji, for smaller images and another vocabulary."""

from functools import partial

from .emoji import comfy_vision
from .emoji.vision import CONFIG, WIDTH
from .text import TextModel


class ChorusDemoClipVision(comfy_vision.ChorusEmojiVision):
    """A CLIP_VISION for images [B, 3, 64, 64]."""

    settings = {**CONFIG, "image_size": 64, "patch_size": 8}
    widths = (32, 64, WIDTH)
    text_model = TextModel


make_clip_vision = partial(comfy_vision.make_clip_vision, kind=ChorusDemoClipVision)
