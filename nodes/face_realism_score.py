"""How far pictures are from others as a set, and how much nearer refining brought them."""

from collections.abc import Sequence

import torch
from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io
from torch import Tensor

from ..host.images import embeddings
from ..techniques.face_refiner.frechet import BLOCKS, Frechet, frechet, frechet_both
from ..techniques.face_refiner.refine import check_pictures
from .checked_inputs import checks_inputs

FEW = 3  # pictures; an interval needs as many
SEED = 0  # of the blocks; the same sets give the same interval


@checks_inputs
class FaceRealismScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaceRealismScore",
            display_name="Face Realism Score",
            category="chorus/train",
            description=(
                "Fréchet distance of two sets of pictures in the features of an image encoder, with an interval. With source"
                " wired: how much of its distance to the target is gone in refined (FIDdiff)."
            ),
            search_aliases=["FID", "FIDdiff", "Frechet distance", "metric", "evaluate"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "refined", tooltip="RGB; batches and lists of any sizes. Hundreds of pictures, better thousands."
                ),
                io.Image.Input(
                    "target", tooltip="What they should look like, as a set: the base model's pictures, or photographs."
                ),
                io.ClipVision.Input("clip_vision", tooltip="Its pooled embeddings are the features."),
                io.Image.Input(
                    "source",
                    optional=True,
                    tooltip="What refined was made of, in the same order and number. The score is FIDdiff then.",
                ),
                io.Int.Input(
                    "blocks",
                    default=BLOCKS,
                    min=FEW,
                    max=1000,
                    advanced=True,
                    tooltip="Of pictures that are left out in turn, for the interval: more take longer and make its width"
                    " surer.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "score",
                    display_name="score",
                    tooltip="Without source the distance (0 is best). With source FIDdiff = distance(source, target) -"
                    " distance(refined, target): more is better, below 0 refining did harm.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Numbers, intervals, and what they are worth."
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
        [encoder], [draws] = clip_vision, blocks
        source = None if source is None or source[0] is None else source  # null in a prompt: not wired
        wired = {"refined": refined, "target": target, **({} if source is None else {"source": source})}
        counts = {name: check_set(name, batches) for name, batches in wired.items()}
        if source is not None and counts["source"] != counts["refined"]:
            raise ValueError(
                f"{counts['source']} source and {counts['refined']} refined pictures; FIDdiff compares the same pictures"
                " before and after: wire both in the same order"
            )
        sets = {name: torch.cat([embeddings(encoder, batch) for batch in batches]) for name, batches in wired.items()}
        generator = torch.Generator().manual_seed(SEED)
        # where there are as many, they are as a rule of one prompt and seed; where not, this order is as good as any
        paired = counts["refined"] == counts["target"]
        width = sets["target"].shape[1]
        lines = [f"{counts['refined']} pictures against {counts['target']}, {width} features"]
        if source is None:
            after = frechet(sets["refined"], sets["target"], generator, draws, paired)
            lines += [say("distance(refined, target)", after)]
            return io.NodeOutput(after.value, "\n".join([*lines, *warnings(min(counts.values()), width, [after])]))
        before, after, gain = frechet_both(sets["source"], sets["refined"], sets["target"], generator, draws, paired)
        lines += [say("distance(source, target)", before), say("distance(refined, target)", after)]
        lines += [say("FIDdiff, the first - the second", gain)]
        if min(counts.values()) > width:
            lines += [closed(before, after)]
        return io.NodeOutput(gain.value, "\n".join([*lines, *warnings(min(counts.values()), width, [before, after])]))


def check_set(name: str, batches: list[Tensor]) -> int:
    """How many pictures there are; refuses too few, and what is no RGB."""
    for batch in batches:
        try:
            check_pictures(batch)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    count = sum(map(len, batches))
    if count < FEW:
        raise ValueError(
            f"{name} holds {count} pictures, and an interval needs {FEW}; wire hundreds, as a batch or a list"
        )
    return count


def say(name: str, found: Frechet) -> str:
    return (
        f"{name} = {found.value:.4g} (95 %: {found.low:.4g} to {found.high:.4g}); {found.corrected:.4g} without the bias of"
        " finite sets"
    )


def closed(before: Frechet, after: Frechet) -> str:
    """What share of the distance is gone."""
    if before.corrected <= (before.high - before.low) / 2:
        return "source is no farther from target than chance: there is no distance to close"
    return f"{1 - after.corrected / before.corrected:.0%} of the distance is closed, both without their bias"


def warnings(count: int, width: int, distances: list[Frechet]) -> list[str]:
    """What the numbers are not worth."""
    found = []
    if count <= width:
        found.append(
            f"Warning: {count} pictures do not fill {width} features, so most of the distance is that of too few pictures."
            " Compare it only with numbers of the same counts, and trust no value without bias;"
            f" more than {width} pictures give a distance, some {10 * width} a good one."
        )
    elif any(one.corrected < one.value / 2 for one in distances):
        found.append(
            "Warning: most of a distance is the bias of finite sets. Compare the values without it, or wire more pictures."
        )
    if count < 2 * BLOCKS:
        found.append(f"Warning: an interval of {count} pictures is itself rough.")
    return found


NODES: list[type[io.ComfyNode]] = [FaceRealismScore]
