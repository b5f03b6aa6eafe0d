"""TrainFaceRefiner: trains a network from images of a few-step model (source) to images of its teacher (target).

After arXiv 2505.02255, which trains a residual U-Net on paired images and a CycleGAN on unpaired images.
"""

from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io
from torch import Tensor

from ..host.gradients import free_memory_for
from ..host.training_images import TrainingImages, training_gradients
from ..host.training_metrics import FEATURES, METRICS, NONE, image_features
from ..host.training_run import training_device_and_dtype
from ..techniques.face_refiner.comfy_model import FaceRefinerModel
from ..techniques.face_refiner.comfy_train_node import image_metric, refiner_run
from ..techniques.face_refiner.comfy_training import previous_steps, trained, training_bytes, weights_of
from ..techniques.face_refiner.training.base import FIRST_WEIGHTS, GENERATOR
from ..techniques.face_refiner.training.generators import ARCHITECTURES, generator_of, new_generator
from ..techniques.face_refiner.training.paired import PairedTrainer, PairedTraining
from ..techniques.face_refiner.training.pairs import NAMES, FaceData, read_images
from ..techniques.face_refiner.training.unpaired import CycleTrainer, CycleTraining
from ..training.generators import seeded_generator
from . import training_widgets as widgets
from .checked_inputs import checks_inputs
from .face_refiner import FaceRefinerSocket
from .training_widgets import single

PREFIX = "face_refiner/refiner"
PAIRED, UNPAIRED = "paired", "unpaired"
PASSES = {PAIRED: 1, UNPAIRED: 6}  # forward passes of a generator per step


@checks_inputs
class TrainFaceRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainFaceRefiner",
            display_name="Train Face Refiner",
            category="chorus/train",
            description="Trains a light network that makes source images look like target images, for Face Refiner.",
            search_aliases=["CycleGAN", "pix2pix", "image to image", "train face"],
            is_experimental=True,
            is_input_list=True,  # data-set nodes output lists
            inputs=[
                io.Image.Input(
                    "source",
                    tooltip="Images of the few-step model: a batch, or a list of images of any sizes. Preferably cropped to the faces.",
                ),
                io.Image.Input(
                    "target",
                    tooltip="Images that show how the source images should look. paired: image i has the prompt and seed"
                    " of source image i.",
                ),
                io.Combo.Input(
                    "pairing",
                    options=[PAIRED, UNPAIRED],
                    default=PAIRED,
                    tooltip="paired: keeps the source's structure and takes the target's look. unpaired: CycleGAN, for two"
                    " unrelated sets; slower.",
                ),
                FaceRefinerSocket.Input(
                    "refiner",
                    optional=True,
                    tooltip="Continue to train this refiner, with its architecture. The optimizer starts anew.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Image encoder. paired: for the metric clip_vision. unpaired: for the validation distance between the sets.",
                ),
                io.Combo.Input(
                    "architecture",
                    options=list(ARCHITECTURES),
                    default=next(iter(ARCHITECTURES)),
                    tooltip="Architecture of a new refiner. residual: the pack's own U-Net with CBAM, which starts as the"
                    " identity. resnet: the generator of CycleGAN. unet: the generator of pix2pix, for crops of 256 or 128.",
                ),
                io.Combo.Input(
                    "metric",
                    options=METRICS,
                    default=FEATURES,
                    tooltip="paired: distance from the target. clip_vision: between the encoder's features, compared"
                    " as in LPIPS. lpips: needs the lpips package. l1, huber: between pixels.",
                ),
                io.Float.Input(
                    "metric_weight",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.05,
                    tooltip="paired: weight of the metric. The paper gives it the same weight as grad_weight. 0: no metric.",
                ),
                widgets.steps(
                    2000, "Training steps. Hundreds show whether it improves; good results take 10,000 and more."
                ),
                widgets.batch_size(4, "Crops per batch."),
                widgets.learning_rate(2e-4, "Learning rate of Adam. It falls to 0 in the second half of the steps."),
                widgets.seed("Seed of the initial weights, the order of the images, the crops and the dropout."),
                widgets.gradient_accumulation(),
                io.Int.Input(
                    "crop",
                    default=256,
                    min=32,
                    max=2048,
                    step=8,
                    advanced=True,
                    tooltip="Side in pixels of the square training crops. Face Refiner scales faces to the same size.",
                ),
                io.Int.Input(
                    "resize",
                    default=0,
                    min=0,
                    max=4096,
                    advanced=True,
                    tooltip="Length to which the shorter side of each image is scaled before cropping; CycleGAN uses 286"
                    " for crops of 256. 0: no scaling.",
                ),
                io.Boolean.Input("flip", default=True, advanced=True, tooltip="Mirror half of the crops."),
                widgets.weight(
                    "grad_weight",
                    1.0,
                    "paired: weight of the distance between the image gradients of result and source; this term keeps the source's structure.",
                ),
                widgets.weight(
                    "l1_weight",
                    0.0,
                    "paired: weight of the L1 distance from the target. pix2pix uses 100, with gan_weight 1.",
                    most=200.0,
                ),
                widgets.weight(
                    "gan_weight",
                    0.0,
                    "paired: weight of the GAN loss. The input of the patch discriminator is the source and the result.",
                    most=10.0,
                ),
                widgets.weight(
                    "cycle_weight",
                    10.0,
                    "unpaired: weight of the cycle consistency: source to target and back must reproduce the source.",
                    most=100.0,
                    step=0.5,
                ),
                widgets.weight(
                    "identity_weight",
                    0.5,
                    "unpaired: weight of the identity loss, multiplied by cycle_weight. This loss keeps targets"
                    " unchanged, which preserves colours.",
                    most=5.0,
                ),
                io.Int.Input(
                    "pool_size",
                    default=50,
                    min=0,
                    max=500,
                    advanced=True,
                    tooltip="unpaired: number of earlier results kept as further inputs of the discriminators.",
                ),
                widgets.ema_decay(),
                widgets.validation_fraction("Fraction of the images used only for validation, at most 32 of each set."),
                *widgets.checkpoints(PREFIX),
                widgets.preview_every("Show validation images on the node every n steps. 0: at the end only."),
                widgets.gradient_checkpointing(
                    True, "Recompute the metric's activations in the backward pass: less memory, more time."
                ),
            ],
            outputs=widgets.results(
                FaceRefinerSocket.Output(
                    "refiner", display_name="refiner", tooltip="For Face Refiner and Save Face Refiner."
                ),
                "Validation losses before and after training, and the distance from the target.",
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
        values = {name: items[0] for name, items in inputs.items()}
        metric = values["metric"]
        settings = widgets.settings_of(PairedTraining if pairing[0] == PAIRED else CycleTraining, values)
        with training_gradients():
            images = (read_images(name, batches, values["resize"]) for name, batches in zip(NAMES, (source, target)))
            data = FaceData(
                *images,
                values["crop"],
                paired=pairing[0] == PAIRED,
                flip=values["flip"],
                validation_fraction=values["validation_fraction"],
            )
            start = _new_refiner(values["architecture"], settings.seed) if resumed is None else resumed
            needs_encoder = isinstance(settings, CycleTraining) or (metric == FEATURES and settings.metric_weight > 0.0)
            features = TrainingImages(
                clip_vision=encoder if needs_encoder else None, checkpoint=values["gradient_checkpointing"]
            )
            trainer, measure = _trainer(data, settings, start, resumed is not None, features, metric)
            run = refiner_run(trainer, measure, **widgets.output_settings(values))
            result = run.train()
        return io.NodeOutput(*result, **widgets.preview(run, cls))


def _new_refiner(architecture: str, seed: int) -> FaceRefinerModel:
    network = new_generator(ARCHITECTURES[architecture], seeded_generator(seed, FIRST_WEIGHTS, GENERATOR))
    return trained(network.state_dict(), {})


def _trainer(
    data: FaceData,
    settings: PairedTraining | CycleTraining,
    start: FaceRefinerModel,
    resumed: bool,
    features: TrainingImages,
    metric: str,
) -> tuple[PairedTrainer | CycleTrainer, str]:
    """The trainer, and the name of its validation distance in the report."""
    device, precision = training_device_and_dtype(start.patcher)
    generator = generator_of(start.patcher.model.config, weights_of(start))
    run: dict[str, Any] = dict(first_step=previous_steps(start), resumed=resumed, device=device, precision=precision)
    if isinstance(settings, PairedTraining):
        distance = image_metric(metric if settings.metric_weight else NONE, features, device)
        trainer, measure = (
            PairedTrainer(generator, data, settings, distance, recording=features.recording, **run),
            metric,
        )
    else:
        extract = None if features.clip_vision is None else image_features(features)
        trainer = CycleTrainer(generator, data, settings, extract, **run)
        measure = "the encoder's features" if extract else "colours and detail"
    weights = sum(p.numel() for p in trainer.loop.trained)
    passes = PASSES[PAIRED if data.paired else UNPAIRED]
    free_memory_for(training_bytes(weights, generator.width, passes, settings.batch_size * data.crop**2), device)
    return trainer, measure


NODES: list[type[io.ComfyNode]] = [TrainFaceRefiner]
