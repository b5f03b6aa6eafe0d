"""Node TrainCasDMHead: trains a head, a network that refines a model's x0, with a perceptual metric on images.

Reconstructs Cas-DM (arXiv 2401.02414), a paper without public code.
"""

from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io

from ..host.attachments import Conditioning
from ..host.training_images import TrainingImages, training_gradients
from ..host.training_metrics import FEATURES, METRICS, NONE
from ..host.training_run import training_device_and_dtype
from ..techniques.cas_dm.comfy_hook import check_compatible, head_target
from ..techniques.cas_dm.comfy_train_node import head_run, latent_metric
from ..techniques.cas_dm.comfy_training import GuidedPrediction, process_of, read_latents
from ..techniques.cas_dm.network import CasDMHeadConfig, Head, HeadFacts, new_head
from ..techniques.cas_dm.training import GATE_WEIGHTS, CasDMTrainer, CasDMTraining
from ..techniques.cas_dm.training_data import FIRST_WEIGHTS, Latents, Process
from ..training.generators import seeded_generator
from . import training_widgets as widgets
from .cas_dm import PREFIX, CasDMHeadSocket, target_of
from .checked_inputs import checks_inputs
from .training_widgets import single

SIZES = {"small": (32, 32, 48), "normal": (64, 64, 96), "large": (96, 128, 192)}


@checks_inputs
class TrainCasDMHead(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainCasDMHead",
            display_name="Train Cas-DM Head",
            category="chorus/train",
            description="Trains a small network to correct the errors of a model's predictions, for Cas-DM Head. The model is not changed.",
            search_aliases=["Cas-DM", "x0 refiner", "LPIPS", "train head"],
            is_experimental=True,
            is_input_list=True,  # data-set nodes output lists
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model as you will sample it: with its LoRAs, blend and other heads."
                ),
                io.Latent.Input(
                    "samples",
                    tooltip="Encoded images like those that you will generate: a batch, or a list of any sizes from the"
                    " data-set nodes.",
                ),
                io.Conditioning.Input("positive", tooltip="One prompt for all images, or one for each."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt of the sampling; not needed at cfg 1."
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="The guidance scale of the sampling. The head learns to correct the model's errors at this scale, and"
                    " stores the scale.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="For metrics on images, and for previews."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="Image encoder of the metric clip_vision."),
                CasDMHeadSocket.Input(
                    "head",
                    optional=True,
                    tooltip="A head to train further. It keeps its size; the optimizer starts anew.",
                ),
                io.Combo.Input(
                    "metric",
                    options=METRICS,
                    default=FEATURES,
                    tooltip="A second loss besides the mean squared error. clip_vision: distance of the encoder's features,"
                    " compared as in LPIPS. lpips: LPIPS itself, which needs its package. l1, huber: on images if vae"
                    " is connected, else on latents.",
                ),
                io.Float.Input(
                    "metric_weight",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.05,
                    tooltip="Weight of the metric; the squared error has weight 1. The paper does not state"
                    " the weight. 0: no metric.",
                ),
                widgets.steps(
                    1000,
                    "Training steps. After 1,000 you see whether the head improves. The demo head took 1,200 with batch size 32.",
                ),
                widgets.batch_size(8, "Images per batch, all of one size."),
                widgets.learning_rate(3e-4, "Learning rate of AdamW, constant after a short warm-up."),
                widgets.seed("Seed of the initial weights, the noise, the noise levels and the crops."),
                widgets.gradient_accumulation(),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default="normal",
                    advanced=True,
                    tooltip="Size of a new head: 0.3, 1 or 3 million weights.",
                ),
                io.Combo.Input(
                    "gate",
                    options=["pixel", "channel", "sample", "fixed"],
                    default="pixel",
                    advanced=True,
                    tooltip="Weight of a new head's x0 in the result. pixel: one value per latent position. channel: one"
                    " per position and channel. sample: one per image. fixed: one half.",
                ),
                io.Boolean.Input(
                    "condition_on_x_t",
                    default=True,
                    advanced=True,
                    tooltip="A new head takes the noisy latent as input besides the model's x0, and learns more from both.",
                ),
                io.Combo.Input(
                    "gate_weights",
                    options=list(GATE_WEIGHTS),
                    default=GATE_WEIGHTS[0],
                    advanced=True,
                    tooltip="Weight of the gate's loss by noise level. paper: as in the paper, near 0 at high noise. even: the same"
                    " at all levels.",
                ),
                widgets.ema_decay(),
                io.Int.Input(
                    "crop",
                    default=256,
                    min=16,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Side in pixels of the crop that the metric compares: memory and time grow with its square.",
                ),
                widgets.validation_fraction(
                    "Fraction of the images used only for validation, at most 32 images. The head is validated before"
                    " and after training, and with every preview and checkpoint. The weights with the best loss are"
                    " returned."
                ),
                io.Int.Input(
                    "cached_steps",
                    default=0,
                    min=0,
                    max=widgets.MOST_STEPS,
                    advanced=True,
                    tooltip="Compute the model's predictions for this many steps first, unload the model, then train on"
                    " these predictions in turn. Use it with little memory or a slow model. 0: evaluate the model at"
                    " every step.",
                ),
                *widgets.checkpoints(PREFIX),
                widgets.preview_every("Show validation images on the node every n steps. 0: at the end only."),
                widgets.gradient_checkpointing(
                    True, "Recompute the metric's activations in the backward pass: less memory, more time."
                ),
            ],
            outputs=widgets.results(
                CasDMHeadSocket.Output("head", display_name="head", tooltip="For Cas-DM Head and Save Cas-DM Head."),
                "Validation losses before and after training, and the errors of the model, the head and their mix.",
            ),
        )

    @classmethod
    def execute(
        cls,
        model: list[ModelPatcher],
        samples: list[dict[str, Any]],
        positive: list[Conditioning],
        negative: list[Conditioning] | None = None,
        vae: list[VAE] | None = None,
        clip_vision: list[ClipVisionModel] | None = None,
        head: list[Head] | None = None,
        **inputs: list[Any],
    ) -> io.NodeOutput:
        base, negative_prompt = model[0], single("negative", negative)
        image_vae, encoder, start = single("vae", vae), single("clip_vision", clip_vision), single("head", head)
        values = {name: items[0] for name, items in inputs.items()}
        cfg, metric = values["cfg"], values["metric"]
        settings = widgets.settings_of(CasDMTraining, values)
        latents = read_latents(base, samples)
        prompts = [entry for conditioning in positive for entry in conditioning]
        theta = GuidedPrediction(base, prompts, negative_prompt, cfg, len(latents))
        if start is None:
            config = dict(
                widths=SIZES[values["size"]], gate=values["gate"], condition_on_x_t=values["condition_on_x_t"]
            )
            start = _new_head(base, cfg, f"{len(latents)} latents", settings.seed, **config)
        else:
            _check_resumed(base, start, cfg)
        with training_gradients():
            kind = metric if settings.metric_weight else NONE
            features = encoder if kind == FEATURES else None
            images = TrainingImages(base, image_vae, features, values["gradient_checkpointing"])
            distance = latent_metric(kind, images, values["crop"])
            data = Latents(latents, Process(*process_of(base)), values["validation_fraction"])
            device, dtype = training_device_and_dtype(base)
            trainer = CasDMTrainer(start, data, theta, settings, distance, device, dtype, images.recording)
            run = head_run(trainer, theta, images, metric, **widgets.output_settings(values))
            result = run.train()
        return io.NodeOutput(*result, **widgets.preview(run, cls))


def _new_head(model: ModelPatcher, cfg: float, data: str, seed: int, **config: Any) -> Head:
    target = head_target(model, cfg)
    check_compatible(model, target)  # rejects latents that no head can refine
    facts = HeadFacts(latent_format=target.latent_format, prediction=target.prediction, cfg=cfg, data=data)
    return new_head(CasDMHeadConfig(channels=target.channels, **config), facts, seeded_generator(seed, FIRST_WEIGHTS))


def _check_resumed(model: ModelPatcher, head: Head, cfg: float) -> None:
    check_compatible(model, target_of(head))
    if head.facts.cfg != cfg:
        raise ValueError(
            f"the head was trained at cfg {head.facts.cfg:g}, but cfg is {cfg:g}; set cfg to {head.facts.cfg:g} to continue"
            " its training, or disconnect head to train a new one"
        )


NODES: list[type[io.ComfyNode]] = [TrainCasDMHead]
