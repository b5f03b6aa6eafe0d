"""Image quality with the Cas-DM head of the general demo checkpoint, in few and in many steps of ComfyUI's sampler.

The head consists of a network φ, which predicts a second x0, and a gate r, which mixes it with the x0 of the model θ.
The prompts are those of unseen canvases with one concept each. Every way of generating images uses the same noise:
  model alone:  θ
  head:         θ and φ, mixed by the learned gate
  second half:  the head with start_percent 0.5: it works only in the second half of the sampling
  fixed r:      φ with r = 0.5 at every pixel
  φ alone:      φ with r = 1

Metrics:
  Fréchet distance to the canvases, in the encoder's embedding and in the classifier's features
  LPIPS-like distance (in the encoder's layers, as in training) to the image of θ from the same noise in many steps
  accuracy: the share of images whose concept an evaluator recognises. There are two evaluators: the encoder, whose
    features were used to train the head, and a classifier, which no training used.

Images are cached in .cache/cas_dm_quality.
"""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import headless
from ..weights import digest

headless.start()

import comfy.utils  # noqa: E402

from ...demo import weights  # noqa: E402
from ...demo.modules import load_checkpoint  # noqa: E402
from ...nodes.cas_dm import CasDMHead  # noqa: E402
from ...techniques.cas_dm.comfy_files import read_head_file  # noqa: E402
from ...techniques.cas_dm.network import Head  # noqa: E402
from ...techniques.face_refiner.frechet import frechet, frechet_difference  # noqa: E402
from ..recipes.cas_dm import PLAN, STYLE  # noqa: E402
from ..recipes.scenes import Scenes  # noqa: E402
from ..recipes.state import write_whole  # noqa: E402
from ..statistics import mean_of_groups, paired_difference  # noqa: E402
from .environment import RESULTS, publish, script_parser  # noqa: E402
from .evaluators import Evaluators  # noqa: E402
from .fresh_process import in_fresh_process  # noqa: E402
from .sampling import generate, save_rows  # noqa: E402

IMAGE_CACHE = Path(__file__).parents[2] / ".cache" / "cas_dm_quality"
SAMPLER, SCHEDULER, CFG = "euler", "normal", PLAN.cfg
STEPS = (4, 20)
PASS = 32  # images per batch and per file
PACKET = 400  # sampling steps (of whole batches) per process, because a process takes a while to start
SCENES = dict(seed=4242, balanced=True, alone=1.0)
SHOWN = 12  # images of each way in the sheet


@dataclass(frozen=True)
class Way:
    name: str
    head: str = PLAN.snapshot  # name of the weights; "": no head
    r: float | None = None  # replaces the learned r
    start: float = 0.0  # start_percent of the node


ALONE = Way("model alone", head="")
WAYS = (ALONE, Way("head"), Way("second half", start=0.5), Way("fixed r", r=0.5), Way("φ alone", r=1.0))


def with_fixed_r(head: Head, r: float) -> Head:
    """A head with the same φ and a fixed r. The training of φ does not depend on r."""
    config, count = dataclasses.replace(head.config, gate="fixed", fixed=r), head.config.channels
    return Head(config, {k: w[:count] if k.startswith("last.") else w for k, w in head.weights.items()}, head.facts)


def generate_missing(jobs: list) -> None:
    """Generate missing images. Called in a new process with one thread."""
    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    model, clip, _ = load_checkpoint("general")
    with torch.inference_mode():
        for way, steps, part in jobs:
            file = image_file(Way(**way), steps, part)
            if not file.exists():
                values = latents(Way(**way), steps, part, model, clip).half()
                write_whole(file, functools.partial(torch.save, values))


def latents(way: Way, steps: int, part: int, model, clip) -> torch.Tensor:
    scenes = Scenes(STYLE, **SCENES)
    prompts = [scenes.caption(scenes.scene(part * PASS + k)) for k in range(PASS)]
    if way.head:
        head = read_head_file(weights.path(way.head))
        head = head if way.r is None else with_fixed_r(head, way.r)
        model = CasDMHead.execute(model, head, 1.0, way.start, 1.0)[0]
    return generate(model, clip, prompts, part, steps, CFG, SAMPLER, SCHEDULER)


@functools.cache
def weights_hash(head: str) -> str:
    """Short hash of the weights of the model and, if given, of the head."""
    return digest("general", *([head] if head else []))[:16]


def image_file(way: Way, steps: int, part: int) -> Path:
    r = "" if way.r is None else f"-r{way.r:g}"
    return IMAGE_CACHE / f"{weights_hash(way.head)}-cfg{CFG:g}{r}-from{way.start:g}-{steps}-{PASS}-{part}.pt"


def generate_all(jobs: list, workers: int) -> None:
    packets, capacity = [], 0
    for job in sorted((job for job in jobs if not image_file(*job).exists()), key=lambda job: -job[1]):
        if capacity < job[1]:
            packets.append([])
            capacity = PACKET
        packets[-1].append(job)
        capacity -= job[1]
    with ThreadPoolExecutor(workers) as pool:
        rows = [[[dataclasses.asdict(way), steps, part] for way, steps, part in packet] for packet in packets]
        for done, _ in enumerate(pool.map(lambda packet: in_fresh_process(generate_missing, packet), rows), 1):
            print(f"generated {done} of {len(packets)} packets", flush=True)


class Images:
    """The images of all ways, and their evaluation against the canvases of the same prompts."""

    def __init__(self, parts: int, reference: int):
        self.parts, self.evaluators = parts, Evaluators()
        _, _, self.vae = load_checkpoint("general")
        pixels, _, scenes = Scenes(STYLE, **SCENES).batch(0, parts * PASS)
        self.concepts = torch.tensor([scene.items[0].concept for scene in scenes])
        self.real = self.evaluators.measure(torch.from_numpy(pixels).float() / 255, self.concepts)
        images = self.load(ALONE, reference)
        self.reference = self.evaluators.measure(images, self.concepts)["encoder layers"]

    def load(self, way: Way, steps: int) -> torch.Tensor:
        """[N, 128, 128, 3] in 0..1"""
        parts = (torch.load(image_file(way, steps, part), weights_only=True).float() for part in range(self.parts))
        return torch.cat([self.vae.decode(part) for part in parts])

    def measure(self, way: Way, steps: int) -> dict[str, np.ndarray | torch.Tensor]:
        """Evaluators' results and distance to the reference for every image."""
        found = self.evaluators.measure(self.load(way, steps), self.concepts)
        apart = found["encoder layers"] - self.reference
        return {**found, "distance": apart.square().sum(1).double().numpy()}


FEATURES = {"frechet": "encoder features", "frechet by the classifier": "classifier features"}
SCORES = ("distance", "classifier", "encoder")


def compare(rows: dict, alone: dict, images: Images) -> dict:
    """One row of the table: means with 95 % intervals, and differences from the model without a head."""
    groups, cell, against = images.concepts.numpy(), {}, {}
    for name, features in FEATURES.items():
        sets, generator = [one[features] for one in (rows, alone, images.real)], torch.Generator().manual_seed(0)
        cell[name] = frechet(sets[0], sets[2], generator)._asdict()
        if rows is not alone:
            against[name] = frechet_difference(*sets, generator)._asdict()
    cell |= {name: mean_of_groups(rows[name], groups) for name in SCORES}
    if rows is not alone:
        against |= {name: paired_difference(rows[name], alone[name], groups) for name in SCORES}
        cell["against the model alone"] = against
    return cell


def measure(images: Images, reference: int) -> list[dict]:
    """The table, with one row for each way and number of steps. Prints each row."""
    table = []
    for steps in STEPS:
        alone = images.measure(ALONE, steps)
        for way in WAYS:
            rows = alone if way == ALONE else images.measure(way, steps)
            table.append({"way": way.name, "steps": steps, **compare(rows, alone, images)})
            print(line(table[-1]), flush=True)
    rows = images.measure(ALONE, reference)
    table.append({"way": ALONE.name, "steps": reference, **compare(rows, rows, images)})
    print(line(table[-1]), flush=True)
    return table


def line(row: dict) -> str:
    cells = ["{value:.4f} ({low:.4f}-{high:.4f})".format(**row[name]) for name in FEATURES]
    cells.append("{:.4f} ({:.4f}-{:.4f})".format(*row["distance"]))
    cells += ["{:.1f} % ({:.0f}-{:.0f})".format(*(100 * v for v in row[name])) for name in ("classifier", "encoder")]
    return f"| {row['steps']} | {row['way']} | " + " | ".join(cells) + " |"


def sheet(images: Images, reference: int, file: Path) -> None:
    """Save a sheet with a row for each way and number of steps, in the table's order, and a column for each prompt."""
    rows = [images.load(way, steps)[:SHOWN] for steps in STEPS for way in WAYS]
    save_rows([*rows, images.load(ALONE, reference)[:SHOWN]], file)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--pictures", type=int, default=320, help=f"number of images of each way, in parts of {PASS}")
    parser.add_argument("--reference", type=int, default=50, help="sampling steps of the images of reference")
    parser.add_argument("--workers", type=int, default=1, help="processes with one thread each")
    parser.add_argument("--name", default="cas_dm_quality", help="name of the result files")
    options = parser.parse_args()
    parts, reference = -(-options.pictures // PASS), options.reference
    needed = [(way, steps) for steps in STEPS for way in WAYS] + [(ALONE, reference)]
    generate_all([(*one, part) for one in needed for part in range(parts)], options.workers)
    with torch.inference_mode():
        images = Images(parts, reference)
        print("| steps | | Fréchet distance, encoder | classifier | distance to the reference | classifier | encoder |")
        print("|---" * 7 + "|")
        table = measure(images, reference)
        sheet(images, reference, RESULTS / f"{options.name}.png")
    settings = vars(options) | {"pictures": parts * PASS, "cfg": CFG, "sampler": SAMPLER, "scheduler": SCHEDULER}
    head = {Path(PLAN.snapshot).name: weights.metadata(PLAN.snapshot)}
    publish(options.name, {"settings": settings, "heads": head, "table": table}, f"\nsheet: {options.name}.png")


if __name__ == "__main__":
    main()
