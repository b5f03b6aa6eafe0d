"""What is a face refiner worth? Face signs by a student of one step, refined, against what its teacher paints of the same noise.

Prompts are of one face sign each, all ways paint them from the same noise, which no refiner met in training:
  student:               1 step, cfg 1
  student, paired:       and one pass of the refiner that was trained on pairs
  student, unpaired:     and one of the refiner that was trained without them
  ..., color_lock:       with the node's default, which keeps colours over wide areas the student's
  teacher in 2 steps:    what the teacher makes of about as much compute as student and refiner take
  student of 4 steps:    and what a student makes of it that takes twice as many
  teacher, other noise:  how far the teacher is from itself; what no refiner can be expected to beat
  teacher:               20 steps, cfg 4; the target

Measured: Fréchet distance to the teacher's pictures, in the image-text encoder's embedding, on whose features the refiners
were trained or chosen, and in the features of the classifier, which was trained apart from all this; FIDdiff (ours: of the
student's less that of the refined) and the share of the distance that is closed, both without the bias of finite sets; the
LPIPS-like distance (the encoder's layers) to the teacher's picture of the same noise; the share of pictures whose sign each
judge names. All of it again for each skin tone of the signs that have them. And the cost, in evaluations of the network, by
FLOPs, and in seconds.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from .. import headless

headless.start()

import comfy.ops  # noqa: E402
import comfy.utils  # noqa: E402

from ...demo import weights  # noqa: E402
from ...demo.modules import load_vision  # noqa: E402
from ...demo.signs import load_signs  # noqa: E402
from ...nodes.face_refiner import FaceRefiner  # noqa: E402
from ...techniques.face_refiner.comfy_model import FaceRefinerModel, wrap  # noqa: E402
from ...techniques.face_refiner.frechet import frechet, frechet_both  # noqa: E402
from ...techniques.face_refiner.networks.image_generators import load_generator  # noqa: E402
from ..first_recipes.encoder import seen_by  # noqa: E402
from ..first_recipes.evaluate import encode, ranks_of  # noqa: E402
from ..first_recipes.face_pairs import (  # noqa: E402
    CHUNK,
    HELD_OUT,
    STUDENT,
    TEACHER,
    Painter,
    canvases,
    captions,
    load,
    load_pairs,
    paint_all,
)
from ..first_recipes.face_refiner import PAIRED, UNPAIRED  # noqa: E402
from ..first_recipes.lists import TONES  # noqa: E402
from ..first_recipes.sign_network import load_sign_classifier  # noqa: E402
from ..statistics import mean_of_groups, paired_difference  # noqa: E402
from .environment import RESULTS, facts, keep  # noqa: E402
from .stopwatch import median  # noqa: E402

BASELINES = {
    "teacher in 2 steps": replace(TEACHER, steps=2),
    "student of 4 steps": replace(STUDENT, checkpoint="general-4-steps", steps=4),
    "teacher, other noise": replace(TEACHER, shift=HELD_OUT // 10),
}
SCORES = ("distance", "classifier", "encoder")
SHOWN = 14  # pictures of a way in the sheet
TIMED = 16  # pictures at once, where seconds are measured


@dataclass(frozen=True)
class Way:
    name: str
    refiner: str  # its file, in the manner of demo/weights.py
    color_lock: bool = False


WAYS = (
    Way("student, paired", PAIRED.file),
    Way("student, unpaired", UNPAIRED.file),
    Way("student, paired, color_lock", PAIRED.file, True),
    Way("student, unpaired, color_lock", UNPAIRED.file, True),
)


def refiner(file: str) -> FaceRefinerModel:
    return wrap(file, load_generator(weights.load(file), comfy.ops.manual_cast), weights.metadata(file))


def refined(pictures: torch.Tensor, head: FaceRefinerModel, color_lock: bool) -> torch.Tensor:
    """IMAGE [N, 64, 64, 3] by the node."""
    limits = dict(strength=1.0, padding=0.0, feather=0, identity_guard=0.0)
    return FaceRefiner.execute(pictures, head, color_lock=color_lock, **limits)[0]


class Judges:
    def __init__(self, numbers: list[int]):
        self.vision, self.classifier = load_vision(), load_sign_classifier()
        plan = canvases(numbers[0])
        items = [plan.scene(number * CHUNK + k).items[0] for number in numbers for k in range(CHUNK)]
        self.signs = torch.tensor([item.sign for item in items])
        toned = np.array([bool(load_signs()[item.sign].tones) for item in items])
        tones = np.array([item.tone for item in items])
        self.groups = {tone or "as they are": toned & (tones == tone) for tone in ("", *TONES)}

    def measure(self, pictures: torch.Tensor) -> dict:
        """For every picture: what each judge sees, and whether it names the sign."""
        embeddings, joins, pooled, right = [], [], [], []
        for part, truth in zip(pictures.split(CHUNK), self.signs.split(CHUNK)):
            x = part.movedim(-1, 1)
            join, embedding = seen_by(self.vision.model, 2 * x - 1)
            embeddings.append(embedding)
            joins.append(join)
            pooled.append(self.classifier.blocks(2 * x - 1).mean((2, 3)))
            right.append(self.classifier.head(pooled[-1]).argmax(1) == truth)
        return {
            "encoder features": torch.cat(embeddings),
            "classifier features": torch.cat(pooled),
            "joins": torch.cat(joins),
            "classifier": torch.cat(right).double().numpy(),
            "encoder": (ranks_of(self.vision, pictures, self.signs)[0] == 0).double().numpy(),
        }


FEATURES = ("encoder features", "classifier features")


def compare(row: dict, student: dict, target: dict, chosen: np.ndarray, groups: np.ndarray) -> dict:
    """One cell of a table: how a way does on the chosen pictures, and what it gains over the student."""
    rows, generator, cell = torch.from_numpy(chosen), torch.Generator().manual_seed(0), {}
    for name in FEATURES:
        sets = [one[name][rows] for one in (student, row, target)]
        if row is student:
            cell[name] = {"distance": frechet(sets[1], sets[2], generator, paired=True)._asdict()}
            continue
        before, after, gain = frechet_both(*sets, generator, paired=True)
        cell[name] = {"distance": after._asdict(), "FIDdiff": gain._asdict()}
        cell[name]["closed"] = 1 - after.corrected / before.corrected
    apart = {id(one): (one["joins"] - target["joins"]).square().sum(1).double().numpy() for one in (row, student)}
    values = {"distance": apart[id(row)], **{name: row[name] for name in SCORES[1:]}}
    others = {"distance": apart[id(student)], **{name: student[name] for name in SCORES[1:]}}
    groups = groups[chosen]
    cell |= {name: mean_of_groups(values[name][chosen], groups) for name in SCORES}
    if row is not student:
        pairs = {name: (values[name][chosen], others[name][chosen]) for name in SCORES}
        cell["against the student"] = {name: paired_difference(*pair, groups) for name, pair in pairs.items()}
    return cell


def table(measured: dict[str, dict], chosen: np.ndarray, groups: np.ndarray) -> dict[str, dict]:
    student, target, found = measured["student"], measured["teacher"], {}
    for name, row in measured.items():
        found[name] = compare(row, student, target, chosen, groups)
        print(line(name, found[name]), flush=True)
    return found


def line(name: str, cell: dict) -> str:
    cells = [name]
    for features in FEATURES:
        one = cell[features]
        cells.append("{value:.3f} ({low:.3f}-{high:.3f})".format(**one["distance"]))
        cells.append(f"{one['closed']:.0%}" if "closed" in one else "")
    cells.append("{:.4f} ({:.4f}-{:.4f})".format(*cell["distance"]))
    cells += ["{:.1f} % ({:.0f}-{:.0f})".format(*(100 * v for v in cell[score])) for score in SCORES[1:]]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| | Fréchet distance, encoder | closed | Fréchet distance, classifier | closed | distance | right, classifier | right,"
    " encoder |\n" + "|---" * 8 + "|"
)


def cost(rounds: int) -> dict:
    """Of a picture: evaluations of the network by FLOPs, and seconds, painted by TIMED at once and one by one."""
    student, teacher, head = Painter(STUDENT), Painter(TEACHER), refiner(PAIRED.file)
    model, clip, _ = student.checkpoint
    network, [[states, options]] = model.model.diffusion_model, encode(clip, "a man")
    with FlopCounterMode(display=False) as of_step:
        network(torch.zeros(1, 12, 16, 16), torch.tensor([500.0]), context=states, y=options["pooled_output"])
    with FlopCounterMode(display=False) as of_head:
        head.patcher.model(torch.zeros(1, 3, 64, 64))
    step, once = of_step.get_total_flops(), of_head.get_total_flops()
    head_evaluations = once / step
    found = {
        "flops": {"evaluation": step, "refiner": once},
        "evaluations": {
            "student": STUDENT.evaluations,
            "refiner": head_evaluations,
            "student and refiner": STUDENT.evaluations + head_evaluations,
            "teacher": TEACHER.evaluations,
        },
        "less compute": 1 - (STUDENT.evaluations + head_evaluations) / TEACHER.evaluations,
        "seconds": {},
    }
    for count in (1, TIMED):
        words, taken = captions(HELD_OUT)[:count], {"student": [], "refiner": [], "teacher": []}
        for _ in range(rounds + 1):
            start = time.perf_counter()
            pictures = student.paint(words, 1)
            middle = time.perf_counter()
            refined(pictures, head, False)
            end = time.perf_counter()
            teacher.paint(words, 1)
            for name, seconds in zip(taken, (middle - start, end - middle, time.perf_counter() - end)):
                taken[name].append(seconds / count)
        taken = {name: values[1:] for name, values in taken.items()}  # the first round loads
        both = [a + b for a, b in zip(taken["student"], taken["refiner"])]
        saved = median([1 - a / b for a, b in zip(both, taken["teacher"])])
        medians = {name: median(values) for name, values in taken.items()}
        found["seconds"][f"{count} at once"] = {**medians, "less time": saved}
    return found


def told(found: dict) -> str:
    evaluations = found["evaluations"]
    lines = [
        f"A refiner's pass costs {evaluations['refiner']:.2f} evaluations by FLOPs; student and refiner"
        f" {evaluations['student and refiner']:.2f}, the teacher {evaluations['teacher']}:"
        f" {found['less compute']:.1%} less."
    ]
    for name, one in found["seconds"].items():
        parts = ", ".join(f"{part} {one[part]['median']:.4f} s" for part in ("student", "refiner", "teacher"))
        low, high = one["less time"]["interval"]
        lines.append(f"{name}: {parts} a picture: {one['less time']['median']:.1%} less time ({low:.1%} to {high:.1%})")
    return "\n".join(lines)


def sheet(shown: dict[str, torch.Tensor], file) -> None:
    """A row for each way; the prompts are the columns."""
    rows = [torch.cat(list(pictures[:SHOWN]), 1) for pictures in shown.values()]
    Image.fromarray((torch.cat(rows) * 255).round().byte().numpy()).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1024, help=f"of each way, in parts of {CHUNK}")
    parser.add_argument("--workers", type=int, default=2, help="processes that paint the pairs, one thread each")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing")
    parser.add_argument("--name", default="face_refiner_quality", help="of the result files")
    options = parser.parse_args()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    numbers = [HELD_OUT + k for k in range(-(-options.pictures // CHUNK))]
    samplings = TEACHER, STUDENT, *BASELINES.values()
    paint_all([(sampling, number) for sampling in samplings for number in numbers], workers=options.workers)
    with torch.inference_mode():
        source, target = (side.float() / 255 for side in load_pairs(numbers))
        shown = {"student": source}
        for way in WAYS:
            if weights.path(way.refiner).exists():
                shown[way.name] = refined(source, refiner(way.refiner), way.color_lock)
        shown |= {name: load(sampling, numbers).float() / 255 for name, sampling in BASELINES.items()}
        shown["teacher"] = target
        judges = Judges(numbers)
        measured = {name: judges.measure(pictures) for name, pictures in shown.items()}
        groups = judges.signs.numpy()
        print(HEADER)
        found = {"all": table(measured, np.ones(len(groups), bool), groups)}
        few = {name: measured[name] for name in ("student", "student, paired", "teacher")}
        for tone, chosen in judges.groups.items():
            print(f"\n{tone}: {chosen.sum()} pictures\n{HEADER}")
            found[tone] = table(few, chosen, groups)
        sheet(shown, RESULTS / f"{options.name}.png")
        costs = cost(options.rounds)
    print(f"\n{told(costs)}")
    settings = vars(options) | {"pictures": len(groups), "student": vars(STUDENT), "teacher": vars(TEACHER)}
    counts = {tone: int(chosen.sum()) for tone, chosen in judges.groups.items()}
    heads = {Path(way.refiner).name: weights.metadata(way.refiner) for way in WAYS if way.name in shown}
    results = {"settings": settings, "heads": heads, "tones": counts, "tables": found, "cost": costs}
    path = keep(options.name, results)
    print(f"\n{facts()['device']}; kept in {path.name} and {options.name}.png")


if __name__ == "__main__":
    main()
