"""What is a Cas-DM head worth? The general demo checkpoint with and without one, in few steps, through the host's sampler.

Prompts are those of canvases that no training saw, one sign each, every way paints them from the same noise:
  model alone:          θ
  head without metric:  trained on squares alone
  head with metric:     trained on the encoder's features too; the one that ships
  fixed r:              the same φ, with r = 0.5 at every pixel
  φ alone:              the same φ, with r = 1: no mix
and, where a head for it was trained, some of these again without guidance (cfg 1).

Measured: Fréchet distance in the encoder's embedding to the canvases themselves; the LPIPS-like distance (the encoder's
layers, as in training) to what θ paints of the same noise in 100 steps; the share of pictures whose sign a judge names:
the classifier, which was trained apart from all of this, and the encoder, whose features the head was trained on.

Heads that do not ship come from `python run.py train-demo --old cas_dm_ablations`. Pictures are kept in .cache/cas_dm_quality and
not painted again.
"""

import argparse
import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import headless
from ..weights import digest

headless.start()

import comfy.utils  # noqa: E402

from ...demo import weights  # noqa: E402
from ...demo.modules import load_checkpoint, load_vision  # noqa: E402
from ...nodes.cas_dm import CasDMHead  # noqa: E402
from ...techniques.cas_dm.comfy_files import read_head_file  # noqa: E402
from ...techniques.cas_dm.network import Head  # noqa: E402
from ...techniques.face_refiner.frechet import frechet, frechet_difference  # noqa: E402
from ..first_recipes.canvas import Canvases  # noqa: E402
from ..first_recipes.cas_dm import ABLATIONS, PLAN  # noqa: E402
from ..first_recipes.encoder import seen_by  # noqa: E402
from ..first_recipes.evaluate import encode, joined, ranks_of, sample  # noqa: E402
from ..first_recipes.sign_network import load_sign_classifier  # noqa: E402
from ..statistics import mean_of_groups, paired_difference  # noqa: E402
from .environment import RESULTS, facts, keep  # noqa: E402
from .fresh_process import in_fresh_process  # noqa: E402

PAINTED = Path(__file__).parents[2] / ".cache" / "cas_dm_quality"
SAMPLER, SCHEDULER, REFERENCE = "euler", "normal", 100
STEPS = (4, 8, 20)
FIXED = 0.5
PASS = 64  # pictures at once, and in one file
PACKET = 400  # steps of a pass that one process takes: it needs a while to start
CANVASES = dict(style="noto", seed=4242, balanced=True, one=1.0)
SHOWN = 12  # pictures of a way in the sheet


@dataclass(frozen=True)
class Way:
    name: str
    cfg: float
    head: str = ""  # its file, in the manner of demo/weights.py; "": none
    r: float | None = None  # instead of the head's own


def ways() -> list[Way]:
    """All whose heads are there; the model alone first, of each guidance scale."""
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
    """The same φ, whose training r does not touch, with another r."""
    config, count = dataclasses.replace(head.config, gate="fixed", fixed=r), head.config.channels
    return Head(config, {k: w[:count] if k.startswith("last.") else w for k, w in head.weights.items()}, head.facts)


def paint(jobs: list) -> None:
    """Pictures that are missing; called in a process of its own, on one thread."""
    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    model, clip, _ = load_checkpoint("general")
    canvases = Canvases(**CANVASES, draw=False)
    with torch.inference_mode():
        for way, steps, part in jobs:
            file = place(Way(**way), steps, part)
            if not file.exists():
                write(latents(Way(**way), steps, part, model, clip, canvases), file)


def latents(way: Way, steps: int, part: int, model, clip, canvases) -> torch.Tensor:
    prompts = [canvases.caption(canvases.scene(part * PASS + k)) for k in range(PASS)]
    positive = joined([encode(clip, prompt) for prompt in prompts])
    if way.head:
        head = read_head_file(weights.path(way.head))
        head = head if way.r is None else with_fixed_r(head, way.r)
        model = CasDMHead.execute(model, head, 1.0, 0.0, 1.0)[0]
    return sample(model, positive, encode(clip, ""), part, PASS, steps, way.cfg, SAMPLER, SCHEDULER)


@functools.cache
def made_by(head: str) -> str:
    """Of other weights another: the model's and those of ``head``, if any."""
    return digest("general", *([head] if head else []))[:16]


def place(way: Way, steps: int, part: int) -> Path:
    r = "" if way.r is None else f"-r{way.r:g}"
    return PAINTED / f"{made_by(way.head)}-cfg{way.cfg:g}{r}-{steps}-{part}.pt"


def write(values: torch.Tensor, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    torch.save(values.half(), part)
    os.replace(part, file)


def paint_all(jobs: list, workers: int) -> None:
    packets, room = [], 0
    for job in sorted((job for job in jobs if not place(*job).exists()), key=lambda job: -job[1]):
        if room < job[1]:
            packets.append([])
            room = PACKET
        packets[-1].append(job)
        room -= job[1]
    with ThreadPoolExecutor(workers) as pool:
        rows = [[[dataclasses.asdict(way), steps, part] for way, steps, part in packet] for packet in packets]
        for done, _ in enumerate(pool.map(lambda packet: in_fresh_process(paint, packet), rows), 1):
            print(f"painted {done} of {len(packets)} packets", flush=True)


class Judges:
    def __init__(self, parts: int):
        self.parts = parts
        self.vision, self.classifier = load_vision(), load_sign_classifier()
        _, _, self.vae = load_checkpoint("general")
        canvases = Canvases(**CANVASES)
        drawn = [canvases.batch(part * PASS, PASS) for part in range(parts)]
        self.signs = torch.tensor([scene.items[0].sign for _, _, scenes in drawn for scene in scenes])
        self.real = self.features(torch.cat([torch.from_numpy(images).float() / 255 for images, _, _ in drawn]))
        self.references = {}

    def pictures(self, way: Way, steps: int) -> torch.Tensor:
        """[N, 64, 64, 3] in 0..1"""
        kept = (torch.load(place(way, steps, part), weights_only=True).float() for part in range(self.parts))
        return torch.cat([self.vae.decode(part) for part in kept])

    def features(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [N, D], and the layers as the head's metric joins them."""
        embeddings, joins = [], []
        for part in pictures.movedim(-1, 1).split(PASS):
            join, embedding = seen_by(self.vision.model, 2 * part - 1)
            embeddings.append(embedding)
            joins.append(join)
        return torch.cat(embeddings), torch.cat(joins)

    def measure(self, way: Way, steps: int) -> dict[str, np.ndarray | torch.Tensor]:
        """For every picture: embedding, distance to the reference, whether the judges name its sign."""
        if way.cfg not in self.references:
            self.references[way.cfg] = self.features(self.pictures(Way("model alone", way.cfg), REFERENCE))[1]
        pictures = self.pictures(way, steps)
        embeddings, joins = self.features(pictures)
        logits = torch.cat([self.classifier(part.movedim(-1, 1)) for part in pictures.split(PASS)])
        return {
            "embeddings": embeddings,
            "distance": (joins - self.references[way.cfg]).square().sum(1).double().numpy(),
            "classifier": (logits.argmax(1) == self.signs).double().numpy(),
            "encoder": (ranks_of(self.vision, pictures, self.signs)[0] == 0).double().numpy(),
        }


SCORES = ("distance", "classifier", "encoder")


def compare(rows: dict, alone: dict, judges: Judges) -> dict:
    """One cell of the table: means with 95 % intervals, and how they differ from the model alone."""
    generator, groups = torch.Generator().manual_seed(0), judges.signs.numpy()
    real = judges.real[0]
    cell = {"frechet": frechet(rows["embeddings"], real, generator)._asdict()}
    cell |= {name: mean_of_groups(rows[name], groups) for name in SCORES}
    if rows is not alone:
        difference = frechet_difference(rows["embeddings"], alone["embeddings"], real, generator)
        cell["against the model alone"] = {"frechet": difference._asdict()} | {
            name: paired_difference(rows[name], alone[name], groups) for name in SCORES
        }
    return cell


def measure(judges: Judges, chosen: list[Way]) -> list[dict]:
    """One row for each way and number of steps."""
    table = []
    for steps in STEPS:
        alone = {}
        for way in chosen:
            rows = judges.measure(way, steps)
            if not way.head:
                alone[way.cfg] = rows
            cell = compare(rows, alone[way.cfg], judges)
            table.append({"way": way.name, "cfg": way.cfg, "steps": steps, **cell})
            print(line(table[-1]), flush=True)
    for cfg in sorted({way.cfg for way in chosen}):
        rows = judges.measure(Way("model alone", cfg), REFERENCE)
        table.append({"way": "model alone", "cfg": cfg, "steps": REFERENCE, **compare(rows, rows, judges)})
        print(line(table[-1]), flush=True)
    return table


def line(row: dict) -> str:
    cells = [f"{row['frechet']['value']:.4f} ({row['frechet']['low']:.4f}-{row['frechet']['high']:.4f})"]
    cells.append("{:.4f} ({:.4f}-{:.4f})".format(*row["distance"]))
    cells += ["{:.1f} % ({:.0f}-{:.0f})".format(*(100 * v for v in row[name])) for name in ("classifier", "encoder")]
    return f"| {row['cfg']:g} | {row['steps']} | {row['way']} | " + " | ".join(cells) + " |"


def sheet(judges: Judges, chosen: list[Way], file: Path) -> None:
    """A row for each way and number of steps, in the table's order; the canvases' prompts are the columns."""
    rows = [torch.cat(list(judges.pictures(way, steps)[:SHOWN]), 1) for steps in STEPS for way in chosen]
    rows.append(torch.cat(list(judges.pictures(chosen[0], REFERENCE)[:SHOWN]), 1))
    Image.fromarray((torch.cat(rows) * 255).round().byte().numpy()).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1024, help=f"of each way, in parts of {PASS}")
    parser.add_argument("--workers", type=int, default=2, help="processes that paint, one thread each")
    parser.add_argument("--name", default="cas_dm_quality", help="of the result files")
    options = parser.parse_args()
    parts, chosen = -(-options.pictures // PASS), ways()
    wanted = [(way, steps) for steps in STEPS for way in chosen]
    wanted += [(Way("model alone", cfg), REFERENCE) for cfg in sorted({way.cfg for way in chosen})]
    paint_all([(*one, part) for one in wanted for part in range(parts)], options.workers)
    with torch.inference_mode():
        judges = Judges(parts)
        print("| cfg | steps | | Fréchet distance | distance to 100 steps | classifier | encoder |")
        print("|---" * 7 + "|")
        table = measure(judges, chosen)
        sheet(judges, chosen, RESULTS / f"{options.name}.png")
    settings = vars(options) | {"pictures": parts * PASS, "sampler": SAMPLER, "scheduler": SCHEDULER}
    heads = {Path(way.head).name: weights.metadata(way.head) for way in chosen if way.head}
    path = keep(options.name, {"settings": settings, "heads": heads, "table": table})
    print(f"\n{facts()['device']}; kept in {path.name} and {options.name}.png")


if __name__ == "__main__":
    main()
