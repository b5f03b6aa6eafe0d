"""Image quality with a Cas-DM head: the general demo checkpoint in few steps of ComfyUI's sampler.

A head consists of a network φ, which predicts a second x0, and a gate r, which mixes it with the x0 of the model θ. The
prompts are those of unseen canvases with one concept each. Every way of generating images uses the same noise:
  model alone:          θ
  head without metric:  trained with L2 only
  head with metric:     also trained with a metric in the image-text encoder's features; ships with the pack
  fixed r:              φ of the head with metric, with r = 0.5 at every pixel
  φ alone:              φ of the head with metric, with r = 1
If a head that was trained without guidance exists, these ways are repeated at cfg 1 with that head, except "head
without metric".

Metrics:
  Fréchet distance to the canvases, in the encoder's embedding
  LPIPS-like distance (in the encoder's layers, as in training) to the image of θ from the same noise in 100 steps
  accuracy: the share of images whose concept an evaluator recognises. There are two evaluators: the encoder, whose
    features were used to train the head, and a classifier, which no training used.

`python run.py train-demo --old cas_dm_ablations` trains the heads that do not ship. Images are cached in
.cache/cas_dm_quality.
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
from ..old_world.canvas import Canvases  # noqa: E402
from ..old_world.cas_dm import ABLATIONS, PLAN  # noqa: E402
from ..old_world.evaluate import generate, save_rows  # noqa: E402
from ..recipes.state import write_whole  # noqa: E402
from ..statistics import mean_of_groups, paired_difference  # noqa: E402
from .environment import RESULTS, publish, script_parser  # noqa: E402
from .evaluators import Evaluators  # noqa: E402
from .fresh_process import in_fresh_process  # noqa: E402

IMAGE_CACHE = Path(__file__).parents[2] / ".cache" / "cas_dm_quality"
SAMPLER, SCHEDULER, REFERENCE = "euler", "normal", 100
STEPS = (4, 8, 20)
FIXED = 0.5
PASS = 64  # images per batch and per file
PACKET = 400  # sampling steps (of whole batches) per process, because a process takes a while to start
CANVASES = dict(style="noto", seed=4242, balanced=True, one=1.0)
SHOWN = 12  # images of each way in the sheet


@dataclass(frozen=True)
class Way:
    name: str
    cfg: float
    head: str = ""  # file name as in demo/weights.py; "": no head
    r: float | None = None  # replaces the learned r


def ways() -> list[Way]:
    """All ways whose heads exist; for each guidance scale, the model alone comes first."""
    cfg = PLAN.cfg
    found = [Way("model alone", cfg)]
    if weights.path(ABLATIONS["without metric"].file).exists():
        found.append(Way("head without metric", cfg, ABLATIONS["without metric"].file))
    found += [
        Way("head with metric", cfg, PLAN.file),
        Way("fixed r", cfg, PLAN.file, FIXED),
        Way("φ alone", cfg, PLAN.file, 1.0),
    ]
    if weights.path(ABLATIONS["unguided"].file).exists():
        file = ABLATIONS["unguided"].file
        found += [Way("model alone", 1.0), Way("head with metric", 1.0, file)]
        found += [Way("fixed r", 1.0, file, FIXED), Way("φ alone", 1.0, file, 1.0)]
    return found


def with_fixed_r(head: Head, r: float) -> Head:
    """A head with the same φ and a fixed r. The training of φ does not depend on r."""
    config, count = dataclasses.replace(head.config, gate="fixed", fixed=r), head.config.channels
    return Head(config, {k: w[:count] if k.startswith("last.") else w for k, w in head.weights.items()}, head.facts)


def generate_missing(jobs: list) -> None:
    """Generate missing images. Called in a new process with one thread."""
    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    model, clip, _ = load_checkpoint("general")
    canvases = Canvases(**CANVASES, draw=False)
    with torch.inference_mode():
        for way, steps, part in jobs:
            file = image_file(Way(**way), steps, part)
            if not file.exists():
                values = latents(Way(**way), steps, part, model, clip, canvases).half()
                write_whole(file, functools.partial(torch.save, values))


def latents(way: Way, steps: int, part: int, model, clip, canvases) -> torch.Tensor:
    prompts = [canvases.caption(canvases.scene(part * PASS + k)) for k in range(PASS)]
    if way.head:
        head = read_head_file(weights.path(way.head))
        head = head if way.r is None else with_fixed_r(head, way.r)
        model = CasDMHead.execute(model, head, 1.0, 0.0, 1.0)[0]
    return generate(model, clip, prompts, part, steps, way.cfg, SAMPLER, SCHEDULER)


@functools.cache
def weights_hash(head: str) -> str:
    """Short hash of the weights of the model and, if given, of the head."""
    return digest("general", *([head] if head else []))[:16]


def image_file(way: Way, steps: int, part: int) -> Path:
    r = "" if way.r is None else f"-r{way.r:g}"
    return IMAGE_CACHE / f"{weights_hash(way.head)}-cfg{way.cfg:g}{r}-{steps}-{part}.pt"


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

    def __init__(self, parts: int):
        self.parts, self.evaluators = parts, Evaluators()
        _, _, self.vae = load_checkpoint("general")
        canvases = Canvases(**CANVASES)
        drawn = [canvases.batch(part * PASS, PASS) for part in range(parts)]
        self.concepts = torch.tensor([scene.items[0].sign for _, _, scenes in drawn for scene in scenes])
        images = torch.cat([torch.from_numpy(images).float() / 255 for images, _, _ in drawn])
        self.real = self.evaluators.measure(images, self.concepts)["encoder features"]
        self.references = {}

    def load(self, way: Way, steps: int) -> torch.Tensor:
        """[N, 64, 64, 3] in 0..1"""
        parts = (torch.load(image_file(way, steps, part), weights_only=True).float() for part in range(self.parts))
        return torch.cat([self.vae.decode(part) for part in parts])

    def measure(self, way: Way, steps: int) -> dict[str, np.ndarray | torch.Tensor]:
        """Evaluators' results and distance to the reference for every image."""
        found = self.evaluators.measure(self.load(way, steps), self.concepts)
        if way.cfg not in self.references:
            reference = self.load(Way("model alone", way.cfg), REFERENCE)
            self.references[way.cfg] = self.evaluators.measure(reference, self.concepts)["encoder layers"]
        apart = found["encoder layers"] - self.references[way.cfg]
        return {**found, "distance": apart.square().sum(1).double().numpy()}


SCORES = ("distance", "classifier", "encoder")


def compare(rows: dict, alone: dict, images: Images) -> dict:
    """One row of the table: means with 95 % intervals, and differences from the model without a head."""
    generator, groups = torch.Generator().manual_seed(0), images.concepts.numpy()
    real = images.real
    cell = {"frechet": frechet(rows["encoder features"], real, generator)._asdict()}
    cell |= {name: mean_of_groups(rows[name], groups) for name in SCORES}
    if rows is not alone:
        difference = frechet_difference(rows["encoder features"], alone["encoder features"], real, generator)
        cell["against the model alone"] = {"frechet": difference._asdict()} | {
            name: paired_difference(rows[name], alone[name], groups) for name in SCORES
        }
    return cell


def measure(images: Images, chosen: list[Way]) -> list[dict]:
    """The table, with one row for each way and number of steps. Prints each row."""
    table = []
    for steps in STEPS:
        alone = {}
        for way in chosen:
            rows = images.measure(way, steps)
            if not way.head:
                alone[way.cfg] = rows
            cell = compare(rows, alone[way.cfg], images)
            table.append({"way": way.name, "cfg": way.cfg, "steps": steps, **cell})
            print(line(table[-1]), flush=True)
    for cfg in sorted({way.cfg for way in chosen}):
        rows = images.measure(Way("model alone", cfg), REFERENCE)
        table.append({"way": "model alone", "cfg": cfg, "steps": REFERENCE, **compare(rows, rows, images)})
        print(line(table[-1]), flush=True)
    return table


def line(row: dict) -> str:
    cells = [f"{row['frechet']['value']:.4f} ({row['frechet']['low']:.4f}-{row['frechet']['high']:.4f})"]
    cells.append("{:.4f} ({:.4f}-{:.4f})".format(*row["distance"]))
    cells += ["{:.1f} % ({:.0f}-{:.0f})".format(*(100 * v for v in row[name])) for name in ("classifier", "encoder")]
    return f"| {row['cfg']:g} | {row['steps']} | {row['way']} | " + " | ".join(cells) + " |"


def sheet(images: Images, chosen: list[Way], file: Path) -> None:
    """Save a sheet with a row for each way and number of steps, in the table's order, and a column for each prompt."""
    rows = [images.load(way, steps)[:SHOWN] for steps in STEPS for way in chosen]
    save_rows([*rows, images.load(chosen[0], REFERENCE)[:SHOWN]], file)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--pictures", type=int, default=1024, help=f"number of images of each way, in parts of {PASS}")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--name", default="cas_dm_quality", help="name of the result files")
    options = parser.parse_args()
    parts, chosen = -(-options.pictures // PASS), ways()
    needed = [(way, steps) for steps in STEPS for way in chosen]
    needed += [(Way("model alone", cfg), REFERENCE) for cfg in sorted({way.cfg for way in chosen})]
    generate_all([(*one, part) for one in needed for part in range(parts)], options.workers)
    with torch.inference_mode():
        images = Images(parts)
        print("| cfg | steps | | Fréchet distance | distance to 100 steps | classifier | encoder |")
        print("|---" * 7 + "|")
        table = measure(images, chosen)
        sheet(images, chosen, RESULTS / f"{options.name}.png")
    settings = vars(options) | {"pictures": parts * PASS, "sampler": SAMPLER, "scheduler": SCHEDULER}
    heads = {Path(way.head).name: weights.metadata(way.head) for way in chosen if way.head}
    publish(options.name, {"settings": settings, "heads": heads, "table": table}, f"\nsheet: {options.name}.png")


if __name__ == "__main__":
    main()
