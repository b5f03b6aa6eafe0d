"""Image quality with a face refiner: refined faces of a 1-step student, compared with faces by its teacher.

Prompts have one face each. All ways use the same noise, which is not used in training:
  student:               1 step, cfg 1
  student, refined:      the student, then one pass of the refiner
  ..., color_lock:       with color_lock (the default), which preserves the student's colours over wide areas
  teacher in 2 steps:    needs about as much compute as student and refiner
  student of 4 steps:    another student, which needs the same compute as the teacher in 2 steps
  teacher, other noise:  20 steps from other noise; its distance is the smallest that a refiner is expected to reach
  teacher:               20 steps, cfg 4; the target

Metrics, also computed for each skin tone, on the concepts that have skin tones:
  Fréchet distance to the teacher's images, in the features of both evaluators. The refiner was trained with the
    image-text encoder; no training used the classifier.
  FIDdiff (our definition): the student's distance minus the distance after refining
  closed: the share of the student's distance that refining removes, with both distances corrected for the bias of
    finite sets
  LPIPS-like distance (in the encoder's layers) to the teacher's image from the same noise
  accuracy by both evaluators

Cost is measured in evaluations of the network (by FLOPs) and in seconds. Images are cached in the folder of the
training state.
"""

import functools
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import headless

headless.start()

import comfy.ops  # noqa: E402
import comfy.utils  # noqa: E402

from ...demo import weights  # noqa: E402
from ...demo.concepts import TONES, load_concepts  # noqa: E402
from ...demo.text import token_rows  # noqa: E402
from ...nodes.face_refiner import FaceRefiner  # noqa: E402
from ...techniques.face_refiner.comfy_model import FaceRefinerModel, wrap  # noqa: E402
from ...techniques.face_refiner.frechet import frechet, frechet_both  # noqa: E402
from ...techniques.face_refiner.networks.image_generators import load_generator  # noqa: E402
from ..recipes import autoencoder, face_pairs, guided, student  # noqa: E402
from ..recipes.lists import FACES  # noqa: E402
from ..recipes.scenes import SIZE, Scenes  # noqa: E402
from ..statistics import mean_of_groups, paired_difference  # noqa: E402
from .environment import RESULTS, publish, script_parser  # noqa: E402
from .evaluators import Evaluators  # noqa: E402
from .sampling import LATENT, save_rows  # noqa: E402
from .stopwatch import median  # noqa: E402

PLAN = face_pairs.PLAN
HELD_OUT = 1_000_000  # number of the first chunk, after those for training and those that ship
SHIFT = 100_000  # added to a chunk's number for other noise


@dataclass(frozen=True)
class Sampling:
    """A checkpoint with its sampling settings. ``shift``: the noise is that of another chunk."""

    stage: str
    steps: int
    cfg: float
    shift: int = 0

    @property
    def evaluations(self) -> int:
        """Forward passes of the network for an image."""
        return self.steps * (1 if self.cfg == 1 else 2)


STUDENT = Sampling(student.ONE.snapshot, 1, 1.0)
TEACHER = Sampling(guided.GENERAL, PLAN.passes, PLAN.cfg)
BASELINES = {
    "teacher in 2 steps": replace(TEACHER, steps=2),
    "student of 4 steps": Sampling(student.FOUR.snapshot, 4, 1.0),
    "teacher, other noise": replace(TEACHER, shift=SHIFT),
}
WAYS = {"student, refined": False, "student, refined, color_lock": True}  # color_lock of each way
SCORES = ("distance", "classifier", "encoder")
SHOWN = 14  # images of each way in the sheet
TIMED = 16  # batch size for the timing


class Images(face_pairs.Side):
    """Chunks of images that a model generates from the prompts and the noise of the face pairs."""

    def __init__(self, sampling: Sampling):
        levels = guided.normal if sampling.cfg != 1 else guided.simple
        model = guided.load(sampling.stage, "student")
        name = f"face-benchmark-{sampling.shift}"
        super().__init__(name, PLAN, model, sampling.cfg, levels(sampling.steps), autoencoder.load())
        self.shift = sampling.shift

    def compute(self, number: int) -> dict[str, torch.Tensor]:
        noise = face_pairs.noise(PLAN, number + self.shift)
        images = self.generate(face_pairs.captions(PLAN, number), noise)
        return {"pictures": (images * 255).round().byte()}

    def generate(self, captions: list[str], noise: torch.Tensor) -> torch.Tensor:
        """Images [N, 128, 128, 3] in 0..1 of N captions."""
        latents = self.guided.sample(noise, token_rows(captions), self.levels)
        return (self.autoencoder.decode(latents).clamp(-1, 1) / 2 + 0.5).movedim(1, -1).cpu()


@functools.cache
def source(sampling: Sampling) -> Images:
    return Images(sampling)


def images_of(sampling: Sampling, numbers: list[int]) -> torch.Tensor:
    """Images [N, 128, 128, 3] in 0..1 of the chunks ``numbers``; missing chunks are generated."""
    for number in numbers:
        source(sampling).make(number, source(sampling).compute)
    return torch.cat([source(sampling).load(number)["pictures"] for number in numbers]).float() / 255


def refiner() -> FaceRefinerModel:
    name = face_pairs.REFINER
    return wrap(name, load_generator(weights.load(name), comfy.ops.manual_cast), weights.metadata(name))


def refined(images: torch.Tensor, model: FaceRefinerModel, color_lock: bool) -> torch.Tensor:
    """Images [N, 128, 128, 3] refined by the FaceRefiner node."""
    limits = dict(strength=1.0, padding=0.0, feather=0, identity_guard=0.0)
    return FaceRefiner.execute(images, model, color_lock=color_lock, **limits)[0]


def concepts_and_tones(numbers: list[int]) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """The concept [N] of every image, and {skin tone: mask [N]}.

    The mask selects the images with this tone. Images of concepts without tones are in no mask.
    """
    scenes, concepts = Scenes("glossy", seed=PLAN.seed, names=FACES, balanced=True, alone=1.0), load_concepts()
    items = [scenes.scene(number * PLAN.batch + k).items[0] for number in numbers for k in range(PLAN.batch)]
    toned = np.array([bool(concepts[item.concept].tones) for item in items])
    tones = np.array([item.tone for item in items])
    chosen = {tone or "as they are": toned & (tones == tone) for tone in ("", *TONES)}
    return torch.tensor([item.concept for item in items]), chosen


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
    head, step = refiner(), flops_of_step()
    with FlopCounterMode(display=False) as of_refiner:
        head.patcher.model(torch.zeros(1, 3, SIZE, SIZE))
    once = of_refiner.get_total_flops()
    both = STUDENT.evaluations + once / step
    found = {
        "flops": {"evaluation": step, "refiner": once},
        "evaluations": {
            "student": STUDENT.evaluations,
            "refiner": once / step,
            "student and refiner": both,
            "teacher": TEACHER.evaluations,
        },
        "less compute": 1 - both / TEACHER.evaluations,
    }
    return found | {"seconds": {f"{count} at once": seconds(head, count, rounds) for count in (1, TIMED)}}


def flops_of_step() -> int:
    """FLOPs of one evaluation of the student's network for one image."""
    model = source(STUDENT).guided
    text = model.encode(token_rows(["a man"]))
    with FlopCounterMode(display=False) as counted:
        model.model.net(torch.zeros(1, *LATENT), torch.tensor([500]), *text)
    return counted.get_total_flops()


def seconds(head: FaceRefinerModel, count: int, rounds: int) -> dict:
    """Seconds per image, with ``count`` images at once: medians of student, refiner and teacher."""
    words, noise = face_pairs.captions(PLAN, HELD_OUT)[:count], face_pairs.noise(PLAN, HELD_OUT)[:count]
    taken = {"student": [], "refiner": [], "teacher": []}
    for _ in range(rounds + 1):
        times = [time.perf_counter()]
        images = source(STUDENT).generate(words, noise)
        times.append(time.perf_counter())
        refined(images, head, False)
        times.append(time.perf_counter())
        source(TEACHER).generate(words, noise)
        times.append(time.perf_counter())
        for values, spent in zip(taken.values(), np.diff(times)):
            values.append(float(spent) / count)
    taken = {name: values[1:] for name, values in taken.items()}  # the first round loads the models
    both = [a + b for a, b in zip(taken["student"], taken["refiner"])]
    saved = median([1 - a / b for a, b in zip(both, taken["teacher"])])
    return {name: median(values) for name, values in taken.items()} | {"less time": saved}


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
    parser.add_argument(
        "--pictures", type=int, default=320, help=f"number of images of each way, in parts of {PLAN.batch}"
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the timing")
    parser.add_argument("--name", default="face_refiner_quality", help="name of the result files")
    options = parser.parse_args()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    numbers, head = [HELD_OUT + k for k in range(-(-options.pictures // PLAN.batch))], refiner()
    with torch.inference_mode():
        shown = {"student": images_of(STUDENT, numbers)}
        shown |= {name: refined(shown["student"], head, color_lock) for name, color_lock in WAYS.items()}
        shown |= {name: images_of(sampling, numbers) for name, sampling in BASELINES.items()}
        shown["teacher"] = images_of(TEACHER, numbers)
        evaluators, (concepts, tones) = Evaluators(), concepts_and_tones(numbers)
        measured = {name: evaluators.measure(images, concepts) for name, images in shown.items()}
        groups = concepts.numpy()
        print(HEADER)
        found = {"all": table(measured, np.ones(len(groups), bool), groups)}
        few = {name: measured[name] for name in ("student", "student, refined", "teacher")}
        for tone, chosen in tones.items():
            print(f"\n{tone}: {chosen.sum()} images\n{HEADER}")
            found[tone] = table(few, chosen, groups)
        # a row for each way, a column for each prompt
        save_rows([images[:SHOWN] for images in shown.values()], RESULTS / f"{options.name}.png")
        costs = cost(options.rounds)
    settings = vars(options) | {"pictures": len(groups), "student": vars(STUDENT), "teacher": vars(TEACHER)}
    counts = {tone: int(chosen.sum()) for tone, chosen in tones.items()}
    results = {"settings": settings, "refiner": weights.metadata(face_pairs.REFINER), "tones": counts}
    publish(options.name, results | {"tables": found, "cost": costs}, f"\n{cost_text(costs)}")


if __name__ == "__main__":
    main()
