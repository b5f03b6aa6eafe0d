"""Trains a network for Face Refiner, on pairs or without: what a few-step model paints, and what it should look like.

After arXiv 2505.02255, which trains a residual U-Net on pairs and CycleGAN without.
"""

from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io, ui
from torch import Tensor

from ..host.gradients import make_room
from ..host.training_images import TrainingPictures, training_gradients
from ..host.training_metrics import FEATURES, METRICS, NONE, set_features
from ..host.training_run import training_place
from ..techniques.face_refiner.comfy_model import FaceRefinerModel
from ..techniques.face_refiner.comfy_train_node import picture_metric, refiner_run
from ..techniques.face_refiner.comfy_training import steps_behind, trained, training_bytes, weights_of
from ..techniques.face_refiner.training.base import FIRST_WEIGHTS, GENERATOR
from ..techniques.face_refiner.training.generators import ARCHITECTURES, generator_of, new_generator
from ..techniques.face_refiner.training.paired import PairedTrainer, PairedTraining
from ..techniques.face_refiner.training.pairs import NAMES, FaceData, read_pictures
from ..techniques.face_refiner.training.unpaired import CycleTrainer, CycleTraining
from ..training.generators import seeded_generator
from . import training_widgets as widgets
from .checked_inputs import checks_inputs
from .face_refiner import FaceRefinerSocket
from .training_widgets import single

PREFIX = "face_refiner/refiner"
PAIRED, UNPAIRED = "paired", "unpaired"
PASSES = {PAIRED: 1, UNPAIRED: 6}  # of a generator in a step


@checks_inputs
class TrainFaceRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainFaceRefiner",
            display_name="Train Face Refiner",
            category="chorus/train",
            description="Teaches a light network to turn source pictures into such as target has, for Face Refiner.",
            search_aliases=["CycleGAN", "pix2pix", "image to image", "train face"],
            is_experimental=True,
            is_input_list=True,  # data-set nodes give lists
            inputs=[
                io.Image.Input(
                    "source",
                    tooltip="As the fast model paints them: a batch, or a list of any sizes. Faces fill them best.",
                ),
                io.Image.Input(
                    "target",
                    tooltip="As they should look. paired: picture by picture the same prompt and seed, in the same order.",
                ),
                io.Combo.Input(
                    "pairing",
                    options=[PAIRED, UNPAIRED],
                    default=PAIRED,
                    tooltip="paired: keeps the source's structure and takes the target's look. unpaired: CycleGAN, on sets that"
                    " know nothing of each other; slower.",
                ),
                FaceRefinerSocket.Input(
                    "refiner",
                    optional=True,
                    tooltip="Train this one on. The optimizer starts afresh; architecture is its own.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Whose features the metric clip_vision compares; unpaired: by which the sets are compared.",
                ),
                io.Combo.Input(
                    "architecture",
                    options=list(ARCHITECTURES),
                    default=next(iter(ARCHITECTURES)),
                    tooltip="Of a new one. residual: the pack's own U-Net with CBAM, which begins by changing nothing."
                    " resnet: CycleGAN's. unet: pix2pix's, for crops of 256 or 128.",
                ),
                io.Combo.Input(
                    "metric",
                    options=METRICS,
                    default=FEATURES,
                    tooltip="paired: how near to the target. clip_vision: the encoder's features, as LPIPS compares them."
                    " lpips: needs its package. l1, huber: of pixels.",
                ),
                io.Float.Input(
                    "metric_weight",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="paired: the paper weighs it as much as grad_weight. 0: no metric.",
                ),
                widgets.steps(2000, "Hundreds show whether it learns; good ones take ten thousand and more."),
                widgets.batch_size(4, "Crops at once."),
                widgets.learning_rate(2e-4, "Adam; falls to 0 in the second half of the steps."),
                widgets.seed("Of the first weights, the order, the crops, the dropout."),
                widgets.gradient_accumulation(),
                io.Int.Input(
                    "crop",
                    default=256,
                    min=32,
                    max=2048,
                    step=8,
                    advanced=True,
                    tooltip="Side in pixels of the squares that it learns on, and to which Face Refiner scales faces.",
                ),
                io.Int.Input(
                    "resize",
                    default=0,
                    min=0,
                    max=4096,
                    advanced=True,
                    tooltip="First scale shorter sides to this; CycleGAN has 286 for crops of 256. 0: as they are.",
                ),
                io.Boolean.Input("flip", default=True, advanced=True, tooltip="Half of the crops as in a mirror."),
                io.Float.Input(
                    "grad_weight",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    advanced=True,
                    tooltip="paired: of the gradients' distance from the source, which keeps its structure.",
                ),
                io.Float.Input(
                    "l1_weight",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    advanced=True,
                    tooltip="paired: of the pixels' distance from the target. pix2pix has 100, with gan_weight 1.",
                ),
                io.Float.Input(
                    "gan_weight",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    advanced=True,
                    tooltip="paired: of a patch discriminator that learns along and sees each result beside its source.",
                ),
                io.Float.Input(
                    "cycle_weight",
                    default=10.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    advanced=True,
                    tooltip="unpaired: there and back again must give the same picture.",
                ),
                io.Float.Input(
                    "identity_weight",
                    default=0.5,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    advanced=True,
                    tooltip="unpaired: targets stay as they are; times cycle_weight. Holds the colours.",
                ),
                io.Int.Input(
                    "pool_size",
                    default=50,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="unpaired: older results that the discriminators are shown again.",
                ),
                widgets.ema_decay(),
                io.Float.Input(
                    "validation_fraction",
                    default=0.1,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of the pictures that is only looked at, not trained on; 32 at most.",
                ),
                *widgets.checkpoints(PREFIX),
                widgets.preview_every(
                    "Show held-out pictures on the node after every so many steps. 0: at the end only."
                ),
                widgets.gradient_checkpointing(
                    True, "The metric's encoder computes again what it would else keep: less memory, more time."
                ),
            ],
            outputs=widgets.results(
                FaceRefinerSocket.Output(
                    "refiner", display_name="refiner", tooltip="For Face Refiner and Save Face Refiner."
                ),
                "Whether it learned, and how near to the target it comes.",
            ),
        )

    @classmethod
    def execute(
        cls,
        source: list[Tensor],
        target: list[Tensor],
        pairing: list[str],
        refiner: list[FaceRefinerModel] | None = None,
        clip_vision: list[ClipVisionModel] | None = None,
        **inputs: list[Any],
    ) -> io.NodeOutput:
        resumed, encoder = single("refiner", refiner), single("clip_vision", clip_vision)
        given = {name: values[0] for name, values in inputs.items()}
        metric, settings = given["metric"], _settings(pairing[0], given)
        with training_gradients():
            pictures = (read_pictures(n, batches, given["resize"]) for n, batches in zip(NAMES, (source, target)))
            data = FaceData(
                *pictures,
                given["crop"],
                paired=pairing[0] == PAIRED,
                flip=given["flip"],
                validation_fraction=given["validation_fraction"],
            )
            start = _new(given["architecture"], settings.seed) if resumed is None else resumed
            compared = isinstance(settings, CycleTraining) or (metric == FEATURES and settings.metric_weight > 0.0)
            seen = TrainingPictures(
                clip_vision=encoder if compared else None, checkpoint=given["gradient_checkpointing"]
            )
            trainer, measure = _trainer(data, settings, start, resumed is not None, seen, metric)
            keep = {name: given[name] for name in ("checkpoint_every", "preview_every")}
            run = refiner_run(trainer, measure, prefix=given["checkpoint_prefix"], **keep)
            result = run.train()
        shown: dict[str, Any] = {} if run.picture is None else {"ui": ui.PreviewImage(run.picture[None], cls=cls)}
        return io.NodeOutput(*result, **shown)


def _settings(pairing: str, given: dict) -> PairedTraining | CycleTraining:
    kind = PairedTraining if pairing == PAIRED else CycleTraining
    settings = {name: value for name, value in given.items() if name in kind.__dataclass_fields__}
    if given["metric"] == NONE and kind is PairedTraining:
        settings["metric_weight"] = 0.0
    return kind(**settings)


def _new(architecture: str, seed: int) -> FaceRefinerModel:
    network = new_generator(ARCHITECTURES[architecture], seeded_generator(seed, FIRST_WEIGHTS, GENERATOR))
    return trained(network.state_dict(), {})


def _trainer(
    data: FaceData,
    settings: PairedTraining | CycleTraining,
    start: FaceRefinerModel,
    resumed: bool,
    seen: TrainingPictures,
    metric: str,
) -> tuple[PairedTrainer | CycleTrainer, str]:
    """The run, and what its report calls the distance that it tells."""
    device, precision = training_place(start.patcher)
    generator = generator_of(start.patcher.model.config, weights_of(start))
    run: dict[str, Any] = dict(first_step=steps_behind(start), resumed=resumed, device=device, precision=precision)
    if isinstance(settings, PairedTraining):
        distance = picture_metric(metric if settings.metric_weight else NONE, seen, device)
        trainer, measure = PairedTrainer(generator, data, settings, distance, recording=seen.recording, **run), metric
    else:
        features = None if seen.clip_vision is None else set_features(seen)
        trainer = CycleTrainer(generator, data, settings, features, **run)
        measure = "the encoder's features" if features else "colours and detail"
    networks = sum(p.numel() for p in trainer.loop.trained)
    passes = PASSES[PAIRED if data.paired else UNPAIRED]
    make_room(training_bytes(networks, generator.width, passes, settings.batch_size * data.crop**2), device)
    return trainer, measure


NODES: list[type[io.ComfyNode]] = [TrainFaceRefiner]
