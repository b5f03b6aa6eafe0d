"""Shows the masks of a blend on its nodes in ComfyUI's page while a sampler runs; web/live_masks.js receives them."""

import base64
import io

from PIL import Image

from ...host.page import Page
from .live import LiveMasks

NODE = "SaliencyNoiseBlend"
EVENT = "chorus.blend_mask"
SETTING = "Chorus.LiveMasks"
# results of earlier runs: the blends before them do not take part in the running one
RESULTS = ("LATENT", "IMAGE", "MASK", "STRING", "BLEND_TRACE")


def live_masks() -> LiveMasks | None:
    """The display of a sampling run that begins now; None if nothing is to be shown.

    All blend nodes before the sampler, a whole chain, show the same mask. They are found in the prompt at the start of
    each run, because a node whose output is cached does not run again, and its output may come from another prompt.
    Nothing is shown without a page, if the page's setting is off, and for nodes of this pack (SeedSelect, trainings),
    which sample many times and have previews of their own.
    """
    page = Page.of_running_prompt()
    if page is None or page.setting(SETTING) is False:
        return None
    blends = [node for node in page.sources(RESULTS) if page.kind(node) == NODE]
    if not blends or page.pack(page.node) == page.pack(blends[0]):
        return None
    ids = [page.displayed(node) for node in blends]

    def show(image: Image.Image) -> None:
        kind, content = encoded(image)
        page.send(EVENT, {"nodes": ids, "type": kind, "image": base64.b64encode(content).decode()})

    return LiveMasks(show, lambda: page.is_connected)


def encoded(image: Image.Image) -> tuple[str, bytes]:
    """The media type and the content of a file of ``image``, in the format that takes the least time.

    This is PNG for an image with a palette (a hard mask), and JPEG for the mixed colours of a soft mask.
    """
    file = io.BytesIO()
    if image.mode == "P":
        image.save(file, "PNG", compress_level=1)
        return "image/png", file.getvalue()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return "image/jpeg", file.getvalue()
