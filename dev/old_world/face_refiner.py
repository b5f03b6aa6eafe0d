"""The face refiner of the pack's own data: from what the student of one step paints of face signs to what its teacher does.

It is trained on pairs: GRAD to the source, and to the target L1 and the features of the demo's image encoder in LPIPS's place;
by the trainers of ``training/``, as Train Face Refiner runs them, with a smaller network of the pack's own kind for pictures
of 64 pixels. ``python run.py train-demo --old face_pairs face_refiner`` writes demo/weights/face_refiner, for Load Face Refiner.

The weights were chosen in trials of 300 steps on chunks of pairs that nothing else uses. With the paper's equal weights of GRAD
and metric the result stays what the source is, blurs and all.

Without pairs (CycleGAN, ``train-demo --old face_refiner_unpaired``) nothing was learned in the time that a CPU has, see BENCHMARKS.md; it
does not ship.
"""

import json
import time
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from ...demo import modules
from ...techniques.face_refiner.comfy_files import FORMAT
from ...techniques.face_refiner.networks.residual import RefinerConfig
from ...techniques.face_refiner.training.base import FIRST_WEIGHTS, GENERATOR
from ...techniques.face_refiner.training.generators import new_generator
from ...techniques.face_refiner.training.paired import PairedTrainer, PairedTraining
from ...techniques.face_refiner.training.pairs import FaceData
from ...techniques.face_refiner.training.unpaired import CycleTrainer, CycleTraining
from ...training.generators import seeded_generator
from ...training.loop import train as train_steps
from ...training.metrics import feature_distance
from ..weights import save_weights
from . import face_pairs, loop
from .device import DEVICE
from .encoder import seen_by

CROP = 64
EXAMINED = 100  # steps between two looks at the held-out pictures
SAVED = 300  # seconds between two files
CONFIG = RefinerConfig(widths=(24, 48, 96, 128))


@dataclass(frozen=True)
class Plan:
    file: str
    settings: PairedTraining | CycleTraining
    config: RefinerConfig = CONFIG


PAIRED = Plan(
    "face_refiner/chorus-demo-faces",
    PairedTraining(
        steps=2000,
        batch_size=8,
        learning_rate=1e-3,
        ema_decay=0.998,
        seed=41,
        metric_weight=4.0,
        l1_weight=1.0,
        grad_weight=0.2,
    ),
)
UNPAIRED = Plan(
    f"{loop.STATES}/face_refiner-unpaired",
    CycleTraining(
        steps=1600,
        batch_size=2,
        learning_rate=5e-4,
        ema_decay=0.998,
        seed=42,
        cycle_weight=1.0,
        identity_weight=0.1,
    ),
    RefinerConfig(
        widths=(16, 32, 64, 96)
    ),  # two of them and two discriminators learn in the time that the other has alone
)


class Features:
    """The demo encoder's layers of pictures [B, S, S, 3] in 0..1, joined as the training node joins them."""

    def __init__(self):
        self.encoder = modules.load_vision().model.to(DEVICE).eval().requires_grad_(False)

    def __call__(self, pictures):
        return seen_by(self.encoder, 2 * pictures.movedim(-1, 1) - 1)[0]


def data(paired):
    sides = (side.movedim(-1, 1).float().div(255) for side in face_pairs.load_pairs(range(face_pairs.CHUNKS)))
    return FaceData(*(list(side) for side in sides), CROP, paired=paired, validation_fraction=0.02)


def trainer_of(plan):
    settings, features = plan.settings, Features()
    generator = new_generator(plan.config, seeded_generator(settings.seed, FIRST_WEIGHTS, GENERATOR))
    precision = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    run = dict(device=DEVICE, precision=precision)
    if isinstance(settings, PairedTraining):
        return PairedTrainer(generator, data(True), settings, feature_distance(features), **run)
    return CycleTrainer(generator, data(False), settings, features, **run)


def train(plan, minutes=None):
    """Run a plan; what did best on the held-out pictures is written, and now and then on the way."""
    if minutes:
        plan = replace(plan, settings=replace(plan.settings, steps=steps_in(plan, minutes)))
    trainer, started = trainer_of(plan), time.time()
    bar, saved = tqdm(total=plan.settings.steps, desc=plan.file, mininterval=10), time.time()

    def after_step(done, loss):
        nonlocal saved
        bar.update()
        if done % EXAMINED == 0:
            told = trainer.loop.evaluate()
            bar.write(f"step {done}: loss {loss:.4f}, held out {told.loss:.5f}, {told.source} -> {told.refined}")
        if time.time() - saved > SAVED:
            saved = time.time()
            write(plan, trainer, trainer.loop.evaluate(), started)

    before = trainer.loop.evaluate()
    bar.write(f"before: held out {before.loss:.5f}, {before.source}")
    train_steps(trainer.loop, after_step)
    write(plan, trainer, trainer.loop.restore_best(), started)


def steps_in(plan, minutes):
    """Steps that there is time for, by the second five of ten."""
    trial, times = trainer_of(replace(plan, settings=replace(plan.settings, steps=10))), []
    train_steps(trial.loop, lambda done, loss: times.append(time.time()))
    return max(10, int(minutes * 60 * 5 / (times[-1] - times[-6])))


def write(plan, trainer, evaluation, started):
    found = {"source": evaluation.source, "refined": evaluation.refined}
    facts = {
        "format": FORMAT,
        "network": str(plan.config),
        **trainer.facts(evaluation),
        "held_out": json.dumps(found),
        "seconds": round(time.time() - started),
        "license": "Apache-2.0",
    }
    save_weights(plan.file, trainer.weights(), **facts)
    print(f"step {trainer.loop.steps}:", json.dumps(found), flush=True)


def main(minutes=None):
    train(PAIRED, minutes)


def unpaired(minutes=None):
    """The face refiner without pairs, for dev/benchmarks/face_refiner_quality.py."""
    train(UNPAIRED, minutes)
