"""Trains a head for Cas-DM Head on the errors of a model: a network that repaints its x0, by a metric of pictures.

Cas-DM (arXiv 2401.02414), a reconstruction: the paper has no public code.
"""

from typing import Any

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io, ui

from ..host.attachments import Conditioning
from ..host.training_images import TrainingPictures, training_gradients
from ..host.training_metrics import FEATURES, METRICS, NONE
from ..host.training_run import training_place
from ..techniques.cas_dm.comfy_hook import check_fits, made_for
from ..techniques.cas_dm.comfy_train_node import head_run, latent_metric
from ..techniques.cas_dm.comfy_training import Guided, process_of, read_latents
from ..techniques.cas_dm.network import CasDMHeadConfig, Head, HeadFacts, new_head
from ..techniques.cas_dm.training import GATE_WEIGHTS, CasDMTrainer, CasDMTraining
from ..techniques.cas_dm.training_data import FIRST_WEIGHTS, Latents, Process
from ..training.generators import seeded_generator
from . import training_widgets as widgets
from .cas_dm import PREFIX, CasDMHeadSocket
from .cas_dm import made_for as of_head
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
            description="Teaches a small network what a model gets wrong, step by step, for Cas-DM Head. The model is not changed.",
            search_aliases=["Cas-DM", "x0 refiner", "LPIPS", "train head"],
            is_experimental=True,
            is_input_list=True,  # data-set nodes give lists
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model, as it will be sampled: with its LoRAs, blend and guidance."
                ),
                io.Latent.Input(
                    "samples",
                    tooltip="Pictures like those it shall paint, encoded: a batch, or a list of any sizes from the data-set"
                    " nodes.",
                ),
                io.Conditioning.Input("positive", tooltip="One prompt for all, or one for each picture."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="As it will be sampled; needed at any cfg but 1."
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="The guidance scale at which the head will be used: it learns the errors of that one. Stored.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="For metrics of pictures, and to show them."),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="Whose features the metric clip_vision compares."
                ),
                CasDMHeadSocket.Input(
                    "head", optional=True, tooltip="Train this one on. The optimizer starts afresh; its sizes are kept."
                ),
                io.Combo.Input(
                    "metric",
                    options=METRICS,
                    default=FEATURES,
                    tooltip="What else than squares the head shall be good at. clip_vision: the encoder's features, as LPIPS"
                    " compares them. lpips: needs its package. l1, huber: of pictures if vae is wired, else of latents.",
                ),
                io.Float.Input(
                    "metric_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Beside the squares, which count 1. The paper's is not known. 0: no metric.",
                ),
                widgets.steps(
                    1000,
                    "A thousand shows whether it learns. The head that comes with the pack took 1,200 steps of 32.",
                ),
                widgets.batch_size(8, "Pictures at once, all of one size."),
                widgets.learning_rate(3e-4, "AdamW, after a short warm-up."),
                widgets.seed("Of the first weights, the noise, the levels, the crops."),
                widgets.gradient_accumulation(),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default="normal",
                    advanced=True,
                    tooltip="Of a new head: 0.3, 1 or 3 M weights.",
                ),
                io.Combo.Input(
                    "gate",
                    options=["pixel", "channel", "sample", "fixed"],
                    default="pixel",
                    advanced=True,
                    tooltip="Of a new head: one r per pixel, per pixel and channel, per picture; fixed: one half.",
                ),
                io.Boolean.Input(
                    "condition_on_x_t",
                    default=True,
                    advanced=True,
                    tooltip="A new head sees the noisy picture beside the model's x0, and learns more from both.",
                ),
                io.Combo.Input(
                    "gate_weights",
                    options=list(GATE_WEIGHTS),
                    default=GATE_WEIGHTS[0],
                    advanced=True,
                    tooltip="paper: as in its loss, next to nothing where there is much noise. even: the same everywhere.",
                ),
                widgets.ema_decay(),
                io.Int.Input(
                    "crop",
                    default=256,
                    min=16,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Side in pixels of what the metric looks at: memory and time grow with its square.",
                ),
                io.Float.Input(
                    "validation_fraction",
                    default=0.1,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of the pictures that is only looked at: before, after, with every preview and checkpoint. 32 at"
                    " most. The weights that do best on them are what you get.",
                ),
                io.Int.Input(
                    "cached_steps",
                    default=0,
                    min=0,
                    max=widgets.MOST_STEPS,
                    advanced=True,
                    tooltip="Ask the model for that many steps first, unload it, then train on them in turn: for little"
                    " memory, or a slow model. 0: ask at every step.",
                ),
                *widgets.checkpoints(PREFIX),
                widgets.preview_every(
                    "Show held-out pictures on the node after every so many steps. 0: at the end only."
                ),
                widgets.gradient_checkpointing(
                    True, "The metric's encoders compute again what they would else keep: less memory, more time."
                ),
            ],
            outputs=widgets.results(
                CasDMHeadSocket.Output("head", display_name="head", tooltip="For Cas-DM Head and Save Cas-DM Head."),
                "Whether it learned, and what the mix is worth.",
            ),
        )

    @classmethod
    def execute(
        cls,
        model: list[ModelPatcher],
        samples: list[dict[str, Any]],
        positive: list[Conditioning],
        cfg: list[float],
        metric: list[str],
        metric_weight: list[float],
        steps: list[int],
        batch_size: list[int],
        learning_rate: list[float],
        seed: list[int],
        gradient_accumulation: list[int],
        size: list[str],
        gate: list[str],
        condition_on_x_t: list[bool],
        gate_weights: list[str],
        ema_decay: list[float],
        crop: list[int],
        validation_fraction: list[float],
        cached_steps: list[int],
        checkpoint_every: list[int],
        checkpoint_prefix: list[str],
        preview_every: list[int],
        gradient_checkpointing: list[bool],
        negative: list[Conditioning] | None = None,
        vae: list[VAE] | None = None,
        clip_vision: list[ClipVisionModel] | None = None,
        head: list[Head] | None = None,
    ) -> io.NodeOutput:
        base, scale, away = model[0], cfg[0], single("negative", negative)
        decoder, encoder, start = single("vae", vae), single("clip_vision", clip_vision), single("head", head)
        settings = CasDMTraining(
            steps=steps[0],
            batch_size=batch_size[0],
            gradient_accumulation=gradient_accumulation[0],
            learning_rate=learning_rate[0],
            metric_weight=0.0 if metric[0] == NONE else metric_weight[0],
            gate_weights=gate_weights[0],
            ema_decay=ema_decay[0],
            seed=seed[0],
            cached_steps=cached_steps[0],
        )
        latents = read_latents(base, samples)
        theta = Guided(base, [entry for prompts in positive for entry in prompts], away, scale, len(latents))
        if start is None:
            config = dict(widths=SIZES[size[0]], gate=gate[0], condition_on_x_t=condition_on_x_t[0])
            start = _new(base, scale, f"{len(latents)} latents", settings.seed, **config)
        else:
            _check_resumed(base, start, scale)
        with training_gradients():
            kind = metric[0] if settings.metric_weight else NONE
            pictures = TrainingPictures(base, decoder, encoder if kind == FEATURES else None, gradient_checkpointing[0])
            distance = latent_metric(kind, pictures, crop[0])
            data = Latents(latents, Process(*process_of(base)), validation_fraction[0])
            place = training_place(base)
            trainer = CasDMTrainer(start, data, theta, settings, distance, *place, pictures.recording)
            keep = dict(checkpoint_every=checkpoint_every[0], preview_every=preview_every[0])
            run = head_run(trainer, theta, pictures, metric[0], prefix=checkpoint_prefix[0], **keep)
            result = run.train()
        shown: dict[str, Any] = {} if run.picture is None else {"ui": ui.PreviewImage(run.picture[None], cls=cls)}
        return io.NodeOutput(*result, **shown)


def _new(model: ModelPatcher, cfg: float, data: str, seed: int, **config: Any) -> Head:
    made = made_for(model, cfg)
    check_fits(model, made)  # latents that no head refines
    facts = HeadFacts(latent_format=made.latent_format, prediction=made.prediction, cfg=cfg, data=data)
    return new_head(CasDMHeadConfig(channels=made.channels, **config), facts, seeded_generator(seed, FIRST_WEIGHTS))


def _check_resumed(model: ModelPatcher, head: Head, cfg: float) -> None:
    check_fits(model, of_head(head))
    if head.facts.cfg != cfg:
        raise ValueError(
            f"the head was trained on predictions at cfg {head.facts.cfg:g}, and cfg is {cfg:g}; set cfg to"
            f" {head.facts.cfg:g} to train it on, or unwire head to begin a new one"
        )


NODES: list[type[io.ComfyNode]] = [TrainCasDMHead]
