"""FaceRealismScore: Fréchet distance of two sets of images, and its reduction by a refiner."""

from collections.abc import Sequence

import torch
from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io
from torch import Tensor

from ..host.images import embeddings
from ..techniques.face_refiner.frechet import BLOCKS, Frechet, frechet, frechet_both
from ..techniques.face_refiner.refine import check_images
from .checked_inputs import checks_inputs

MIN_IMAGES = 3  # fewest images for an interval
MIN_BLOCKS = 10  # with fewer, the width of the interval is mostly random
SEED = 0  # fixed, so that the same sets give the same interval


@checks_inputs
class FaceRealismScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaceRealismScore",
            display_name="Face Realism Score",
            category="chorus/train",
            description=(
                "Fréchet distance of two sets of images in the features of an image encoder, with a confidence interval. With"
                " source connected, it measures how much closer refined is to target than source is (FIDdiff)."
            ),
            search_aliases=["FID", "FIDdiff", "Frechet distance", "metric", "evaluate"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "refined",
                    tooltip="Refined images, RGB; batches and lists of any sizes. Use hundreds, preferably thousands.",
                ),
                io.Image.Input(
                    "target",
                    tooltip="Images that show how the refined images should look: images of the base model, or photographs.",
                ),
                io.ClipVision.Input("clip_vision", tooltip="Image encoder. Its pooled embeddings are the features."),
                io.Image.Input(
                    "source",
                    optional=True,
                    tooltip="The images before refining, in the same order and number as refined. The score is then FIDdiff.",
                ),
                io.Int.Input(
                    "blocks",
                    default=BLOCKS,
                    min=MIN_BLOCKS,
                    max=200,
                    advanced=True,
                    tooltip="Number of blocks of images. For the interval, the jackknife leaves out one block after"
                    " another. More blocks take longer and make the width of the interval more exact.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "score",
                    display_name="score",
                    tooltip="Without source: the distance, 0 is best. With source: FIDdiff = distance(source, target) -"
                    " distance(refined, target). Higher is better; below 0, refining made the images worse.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The distances, their intervals, and warnings."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        refined: list[Tensor],
        target: list[Tensor],
        clip_vision: list[ClipVisionModel],
        source: list[Tensor] | None = None,
        blocks: Sequence[int] = (BLOCKS,),
    ) -> io.NodeOutput:
        [encoder], [block_count] = clip_vision, blocks
        source = None if source is None or source[0] is None else source  # null in an API prompt means not connected
        inputs = {"refined": refined, "target": target, **({} if source is None else {"source": source})}
        counts = {name: count_images(name, batches) for name, batches in inputs.items()}
        if source is not None and counts["source"] != counts["refined"]:
            raise ValueError(
                f"got {counts['source']} source and {counts['refined']} refined images; connect equal numbers in the"
                " same order, since FIDdiff compares the same images before and after refining"
            )
        sets = {name: torch.cat([embeddings(encoder, batch) for batch in batches]) for name, batches in inputs.items()}
        generator = torch.Generator().manual_seed(SEED)
        # sets of equal size usually have the same prompts and seeds; if not, pairing them does no harm
        paired = counts["refined"] == counts["target"]
        width = sets["target"].shape[1]
        lines = [f"{counts['refined']} images against {counts['target']}, {width} features"]
        if source is None:
            after = frechet(sets["refined"], sets["target"], generator, block_count, paired)
            lines += [distance_line("distance(refined, target)", after)]
            return io.NodeOutput(after.value, "\n".join([*lines, *warnings(min(counts.values()), width, [after])]))
        before, after, gain = frechet_both(
            sets["source"], sets["refined"], sets["target"], generator, block_count, paired
        )
        lines += [distance_line("distance(source, target)", before), distance_line("distance(refined, target)", after)]
        lines += [distance_line("FIDdiff, the first distance minus the second", gain)]
        if min(counts.values()) > width:
            lines += [reduction_line(before, after)]
        return io.NodeOutput(gain.value, "\n".join([*lines, *warnings(min(counts.values()), width, [before, after])]))


def count_images(name: str, batches: list[Tensor]) -> int:
    """The number of images in the input ``name``. Raises a ValueError if they are not RGB or fewer than MIN_IMAGES."""
    for batch in batches:
        check_images(batch, name)
    count = sum(map(len, batches))
    if count < MIN_IMAGES:
        raise ValueError(
            f"{name} holds {count} images, but an interval needs at least {MIN_IMAGES}; connect hundreds, as a batch"
            " or a list"
        )
    return count


def distance_line(name: str, distance: Frechet) -> str:
    return (
        f"{name} = {distance.value:.4g} (95 %: {distance.low:.4g} to {distance.high:.4g});"
        f" {distance.corrected:.4g} without the bias of finite sets"
    )


def reduction_line(before: Frechet, after: Frechet) -> str:
    """The line about the fraction of the source's distance that refining removed."""
    if before.corrected <= (before.high - before.low) / 2:
        return "the distance between source and target may be due to chance: there is no distance to close"
    return f"{1 - after.corrected / before.corrected:.0%} of the distance is closed (both distances without their bias)"


def warnings(count: int, width: int, distances: list[Frechet]) -> list[str]:
    """Warnings about distances of too few images."""
    lines = []
    if count <= width:
        lines.append(
            f"Warning: {count} images are too few for {width} features, so most of the distance is bias. Compare it only with"
            " distances of equally many images, and do not rely on the values without bias. Use more than"
            f" {width} images, best about {10 * width}."
        )
    elif any(one.corrected < one.value / 2 for one in distances):
        lines.append(
            "Warning: more than half of a distance is the bias of finite sets. Compare the values without bias, or"
            " connect more images."
        )
    if count < 2 * BLOCKS:
        lines.append(f"Warning: with {count} images the interval is only approximate.")
    return lines


NODES: list[type[io.ComfyNode]] = [FaceRealismScore]
