"""Image quality with a face refiner: refined faces of a 1-step student, compared with faces by its teacher.

Prompts have one face each. All ways use the same noise, which is not used in training:
  student:               1 step, cfg 1
  student, paired:       the student, then one pass of the refiner that was trained on pairs
  student, unpaired:     the student, then one pass of the refiner that was trained without pairs
  ..., color_lock:       each of these two with color_lock (the default), which preserves the student's colours over
                         wide areas
  teacher in 2 steps:    needs 1.5 times the compute of student and refiner
  student of 4 steps:    another student, which needs the same compute as the teacher in 2 steps
  teacher, other noise:  20 steps from other noise; its distance is the smallest that a refiner is expected to reach
  teacher:               20 steps, cfg 4; the target

Metrics, also computed for each skin tone, on the concepts that have skin tones:
  Fréchet distance to the teacher's images, in the features of both evaluators. The refiners were trained or selected
    with the image-text encoder; no training used the classifier.
  FIDdiff (our definition): the student's distance minus the distance after refining
  closed: the share of the student's distance that refining removes, with both distances corrected for the bias of
    finite sets
  LPIPS-like distance (in the encoder's layers) to the teacher's image from the same noise
  accuracy by both evaluators

Cost is measured in evaluations of the network (by FLOPs) and in seconds.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import headless

headless.start()

import comfy.ops  # noqa: E402
import comfy.utils  # noqa: E402

from ...demo import weights  # noqa: E402
from ...demo.concepts import load_concepts  # noqa: E402
from ...demo.emoji.concepts import TONES  # noqa: E402
from ...nodes.face_refiner import FaceRefiner  # noqa: E402
from ...techniques.face_refiner.comfy_model import FaceRefinerModel, wrap  # noqa: E402
from ...techniques.face_refiner.frechet import frechet, frechet_both  # noqa: E402
from ...techniques.face_refiner.networks.image_generators import load_generator  # noqa: E402
from ..old_world.evaluate import encode, save_rows  # noqa: E402
from ..old_world.face_pairs import (  # noqa: E402
    CHUNK,
    HELD_OUT,
    STUDENT,
    TEACHER,
    Generator,
    canvases,
    captions,
    generate_all,
    load,
    load_pairs,
)
from ..old_world.face_refiner import PAIRED, UNPAIRED  # noqa: E402
from ..statistics import mean_of_groups, paired_difference  # noqa: E402
from .environment import RESULTS, publish, script_parser  # noqa: E402
from .evaluators import Evaluators  # noqa: E402
from .stopwatch import median  # noqa: E402

BASELINES = {
    "teacher in 2 steps": replace(TEACHER, steps=2),
    "student of 4 steps": replace(STUDENT, checkpoint="general-4-steps", steps=4),
    "teacher, other noise": replace(TEACHER, shift=HELD_OUT // 10),
}
SCORES = ("distance", "classifier", "encoder")
SHOWN = 14  # images of each way in the sheet
TIMED = 16  # batch size for the timing


@dataclass(frozen=True)
class Way:
    name: str
    refiner: str  # file name as in demo/weights.py
    color_lock: bool = False


WAYS = (
    Way("student, paired", PAIRED.file),
    Way("student, unpaired", UNPAIRED.file),
    Way("student, paired, color_lock", PAIRED.file, True),
    Way("student, unpaired, color_lock", UNPAIRED.file, True),
)


def refiner(file: str) -> FaceRefinerModel:
    return wrap(file, load_generator(weights.load(file), comfy.ops.manual_cast), weights.metadata(file))


def refined(images: torch.Tensor, model: FaceRefinerModel, color_lock: bool) -> torch.Tensor:
    """Images [N, 64, 64, 3] refined by the FaceRefiner node."""
    limits = dict(strength=1.0, padding=0.0, feather=0, identity_guard=0.0)
    return FaceRefiner.execute(images, model, color_lock=color_lock, **limits)[0]


def concepts_and_tones(numbers: list[int]) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """The concept [N] of every image, and {skin tone: mask [N]}.

    The mask selects the images with this tone. Images of concepts without tones are in no mask.
    """
    plan, concepts = canvases(numbers[0]), load_concepts()
    items = [plan.scene(number * CHUNK + k).items[0] for number in numbers for k in range(CHUNK)]
    toned, tones = (
        np.array([bool(concepts[item.sign].tones) for item in items]),
        np.array([item.tone for item in items]),
    )
    chosen = {tone or "as they are": toned & (tones == tone) for tone in ("", *TONES)}
    return torch.tensor([item.sign for item in items]), chosen


FEATURES = ("encoder features", "classifier features")


def compare(row: dict, student: dict, target: dict, chosen: np.ndarray, groups: np.ndarray) -> dict:
    """One row of a table: metrics of one way on the chosen images, and differences from the student."""
    rows, generator, cell = torch.from_numpy(chosen), torch.Generator().manual_seed(0), {}
    for name in FEATURES:
        sets = [one[name][rows] for one in (student, row, target)]
        if row is student:
            cell[name] = {"distance": frechet(sets[1], sets[2], generator, paired=True)._asdict()}
            continue
        before, after, gain = frechet_both(*sets, generator, paired=True)
        cell[name] = {"distance": after._asdict(), "FIDdiff": gain._asdict()}
        cell[name]["closed"] = 1 - after.corrected / before.corrected
    apart = {
        id(one): (one["encoder layers"] - target["encoder layers"]).square().sum(1).double().numpy()
        for one in (row, student)
    }
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
    "| | Fréchet distance, encoder | closed | Fréchet distance, classifier | closed | LPIPS-like distance |"
    " accuracy, classifier | accuracy, encoder |\n" + "|---" * 8 + "|"
)


def cost(rounds: int) -> dict:
    """Cost per image: evaluations of the network (by FLOPs), and seconds with batch sizes 1 and TIMED."""
    student, teacher, head = Generator(STUDENT), Generator(TEACHER), refiner(PAIRED.file)
    model, clip, _ = student.checkpoint
    network, [[states, options]] = model.model.diffusion_model, encode(clip, "a man")
    with FlopCounterMode(display=False) as of_step:
        network(torch.zeros(1, 12, 16, 16), torch.tensor([500.0]), context=states, y=options["pooled_output"])
    with FlopCounterMode(display=False) as of_refiner:
        head.patcher.model(torch.zeros(1, 3, 64, 64))
    step, once = of_step.get_total_flops(), of_refiner.get_total_flops()
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
            images = student.pictures(words, 1)
            middle = time.perf_counter()
            refined(images, head, False)
            end = time.perf_counter()
            teacher.pictures(words, 1)
            for name, seconds in zip(taken, (middle - start, end - middle, time.perf_counter() - end)):
                taken[name].append(seconds / count)
        taken = {name: values[1:] for name, values in taken.items()}  # the first round loads the models
        both = [a + b for a, b in zip(taken["student"], taken["refiner"])]
        saved = median([1 - a / b for a, b in zip(both, taken["teacher"])])
        medians = {name: median(values) for name, values in taken.items()}
        found["seconds"][f"{count} at once"] = {**medians, "less time": saved}
    return found


def cost_text(found: dict) -> str:
    evaluations = found["evaluations"]
    lines = [
        f"Evaluations by FLOPs: {evaluations['refiner']:.2f} for a pass of the refiner,"
        f" {evaluations['student and refiner']:.2f} for student and refiner, {evaluations['teacher']} for the teacher;"
        f" student and refiner need {found['less compute']:.1%} less than the teacher."
    ]
    for name, one in found["seconds"].items():
        parts = ", ".join(f"{part} {one[part]['median']:.4f} s" for part in ("student", "refiner", "teacher"))
        low, high = one["less time"]["interval"]
        lines.append(f"{name}: {parts} per image: {one['less time']['median']:.1%} less time ({low:.1%} to {high:.1%})")
    return "\n".join(lines)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--pictures", type=int, default=1024, help=f"number of images of each way, in parts of {CHUNK}")
    parser.add_argument("--workers", type=int, default=2, help="processes that generate the pairs, one thread each")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the timing")
    parser.add_argument("--name", default="face_refiner_quality", help="name of the result files")
    options = parser.parse_args()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    numbers = [HELD_OUT + k for k in range(-(-options.pictures // CHUNK))]
    samplings = TEACHER, STUDENT, *BASELINES.values()
    generate_all([(sampling, number) for sampling in samplings for number in numbers], workers=options.workers)
    with torch.inference_mode():
        source, target = (side.float() / 255 for side in load_pairs(numbers))
        shown = {"student": source}
        for way in WAYS:
            if weights.path(way.refiner).exists():
                shown[way.name] = refined(source, refiner(way.refiner), way.color_lock)
        shown |= {name: load(sampling, numbers).float() / 255 for name, sampling in BASELINES.items()}
        shown["teacher"] = target
        evaluators, (concepts, tones) = Evaluators(), concepts_and_tones(numbers)
        measured = {name: evaluators.measure(images, concepts) for name, images in shown.items()}
        groups = concepts.numpy()
        print(HEADER)
        found = {"all": table(measured, np.ones(len(groups), bool), groups)}
        few = {name: measured[name] for name in ("student", "student, paired", "teacher")}
        for tone, chosen in tones.items():
            print(f"\n{tone}: {chosen.sum()} images\n{HEADER}")
            found[tone] = table(few, chosen, groups)
        # a row for each way, a column for each prompt
        save_rows([images[:SHOWN] for images in shown.values()], RESULTS / f"{options.name}.png")
        costs = cost(options.rounds)
    settings = vars(options) | {"pictures": len(groups), "student": vars(STUDENT), "teacher": vars(TEACHER)}
    counts = {tone: int(chosen.sum()) for tone, chosen in tones.items()}
    heads = {Path(way.refiner).name: weights.metadata(way.refiner) for way in WAYS if way.name in shown}
    results = {"settings": settings, "heads": heads, "tones": counts, "tables": found, "cost": costs}
    publish(options.name, results, f"\n{cost_text(costs)}")


if __name__ == "__main__":
    main()
