"""Nodes that train a style LoRA for a masked token model on one or a few images, save it, and apply it to a model.

aMUSEd: An Open MUSE Reproduction (arXiv 2401.01808, section 4), after StyleDrop (arXiv 2306.00983).
"""

import logging
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..host.attachments import Conditioning
from ..host.gradients import free_memory_for
from ..host.training_images import training_gradients
from ..host.training_run import TrainingRun, release_memory, training_device_and_dtype
from ..techniques.masked_tokens.canvas import rgb
from ..techniques.masked_tokens.comfy_lora_files import NONE, lora_files, read_lora, write_lora
from ..techniques.masked_tokens.comfy_model import MaskedTokenModel
from ..techniques.masked_tokens.comfy_run import decode_tokens, encode_images, read_prompts
from ..techniques.masked_tokens.comfy_training import add_lora, merged_weights
from ..techniques.masked_tokens.decode import MaskedTokenSettings, decode, draw_uniforms
from ..techniques.masked_tokens.lora import Lora, check_fits, from_file, to_file
from ..techniques.masked_tokens.training import (
    LoraTrainer,
    LoraTraining,
    TrainingImages,
    checkpoint_layers,
    frozen_uvit,
    report,
    training_bytes,
)
from . import training_widgets as widgets
from .checked_inputs import checks_inputs
from .file_widgets import filename_prefix
from .sockets import MaskedTokenLoraSocket, MaskedTokenModelSocket

PREFIX = "loras/masked_token_lora"
PREVIEW_STEPS = 8


@checks_inputs
class LoadMaskedTokenLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadMaskedTokenLora",
            display_name="Load Masked Token LoRA",
            category="chorus",
            description="Applies a style LoRA, from an aMUSEd LoRA file or from training, to a masked token model."
            " Chain several nodes for several styles.",
            search_aliases=["aMUSEd LoRA", "StyleDrop", "masked token style"],
            inputs=[
                MaskedTokenModelSocket.Input("model", tooltip="The model, with or without other LoRAs."),
                io.Combo.Input(
                    "lora_name",
                    options=lora_files(),
                    default=NONE,
                    tooltip="A LoRA of the transformer, a .safetensors file in models/loras or output/loras. Ignored"
                    " if lora is connected.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Strength of the style. 0 leaves the model unchanged. Useful: 0.5 to 1.5.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    tooltip="Alpha of the LoRA's training: the weights are scaled by alpha / rank. 0: the file's"
                    " alpha, or the rank if the file has no alpha. aMUSEd's published files have no alpha: use 32 for"
                    " rank 16, or 1 for the style of one image at 512 pixels.",
                ),
                MaskedTokenLoraSocket.Input(
                    "lora", optional=True, tooltip="A LoRA from Train Masked Token LoRA, used instead of a file."
                ),
            ],
            outputs=[
                MaskedTokenModelSocket.Output("model", display_name="model"),
                MaskedTokenLoraSocket.Output("lora", display_name="lora", tooltip="To continue its training."),
            ],
        )

    @classmethod
    def execute(
        cls, model: MaskedTokenModel, lora_name: str, strength: float, alpha: float, lora: Lora | None = None
    ) -> io.NodeOutput:
        lora = (lora or _read_file(lora_name, alpha)).with_alpha(alpha)
        check_fits(lora, {name: weight.shape for name, weight in model.transformer.model.state_dict().items()})
        if strength != 0.0:
            model = add_lora(model, lora.weights, strength)
        return io.NodeOutput(model, lora)


def _read_file(name: str, alpha: float) -> Lora:
    """The LoRA in the file ``name``; logs what is not used.

    ``alpha``: the widget of the node. If it is not 0, the caller replaces the file's alpha by it, and the log does not
    mention the file's settings of the scale.
    """
    if name == NONE:
        raise ValueError(
            "expected a LoRA, got none; choose a file as 'lora_name', or connect 'lora' from Train Masked Token LoRA"
        )
    content = read_lora(name)
    try:
        lora, text_encoder_keys, warnings = from_file(*content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if text_encoder_keys:
        logging.warning(
            "LoadMaskedTokenLora: %d keys of %s are for the text encoder and were ignored; load the file with Load LoRA"
            " on the CLIP as well",
            len(text_encoder_keys),
            name,
        )
    for warning in warnings if alpha == 0.0 else ():
        logging.warning("LoadMaskedTokenLora: %s: %s", name, warning)
    return lora


@checks_inputs
class SaveMaskedTokenLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveMaskedTokenLora",
            display_name="Save Masked Token LoRA",
            category="chorus/train",
            description="Saves a LoRA with its alpha to the output folder, in diffusers' layout.",
            search_aliases=["aMUSEd LoRA", "export lora"],
            is_output_node=True,
            inputs=[
                MaskedTokenLoraSocket.Input("lora", tooltip="From Train Masked Token LoRA."),
                filename_prefix(PREFIX, " Load Masked Token LoRA lists the files in loras/."),
            ],
            outputs=[MaskedTokenLoraSocket.Output("lora", display_name="lora", tooltip="The saved LoRA.")],
        )

    @classmethod
    def execute(cls, lora: Lora, filename_prefix: str) -> io.NodeOutput:
        path = write_lora(filename_prefix, *to_file(lora))
        logging.info("SaveMaskedTokenLora: saved %s", path)
        return io.NodeOutput(lora)


@checks_inputs
class TrainMaskedTokenLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainMaskedTokenLora",
            display_name="Train Masked Token LoRA",
            category="chorus/train",
            description="Trains a LoRA of a masked token model (aMUSEd) on the style of one or a few images.",
            search_aliases=["aMUSEd LoRA", "StyleDrop", "train lora", "style from one image"],
            is_experimental=True,
            inputs=[
                MaskedTokenModelSocket.Input(
                    "model",
                    tooltip="The model to train. LoRAs applied to it are merged; the new LoRA is added to them.",
                ),
                io.Image.Input(
                    "images",
                    tooltip="One image or a batch, of any size: the short side is resized to the resolution, then"
                    " squares are cropped at random.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="Prompt of the images, such as 'A mushroom in [V] style': one for all, or one per image,"
                    " joined with Conditioning (Combine).",
                ),
                io.Int.Input("rank", default=16, min=1, max=256, tooltip="Rank of the LoRA. The papers use 16."),
                io.Float.Input(
                    "alpha",
                    default=32.0,
                    min=0.5,
                    max=256.0,
                    step=0.5,
                    tooltip="The LoRA is scaled by alpha / rank. aMUSEd's scripts use 32; for one image at 512 pixels"
                    " they use 1, with a learning rate of 1e-3. Programs that do not read alpha from the file assume"
                    " that it is equal to the rank.",
                ),
                widgets.steps(1500, "Training steps. 1500 to 2000 for one image in the papers."),
                widgets.batch_size(1, "Crops per batch. 1 for one image, 8 to 16 for many."),
                widgets.learning_rate(
                    4e-4,
                    "Constant learning rate of AdamW. One image: 4e-4 at 256 pixels, 1e-3 with alpha 1 at 512 pixels."
                    " Many images: 8e-4 at 256 pixels, 1e-4 at 512 pixels.",
                ),
                widgets.seed("Seed of the initial weights, the crops and the masks."),
                MaskedTokenLoraSocket.Input(
                    "lora",
                    optional=True,
                    tooltip="LoRA to continue training, with the same rank and alpha. The optimizer state starts anew."
                    " Connect a model to which this LoRA is not applied.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Side of the square crops in pixels. 0: the model's resolution.",
                ),
                *widgets.checkpoints(PREFIX),
                widgets.preview_every("Show a preview of the first prompt on the node every n steps. 0: never."),
                widgets.gradient_checkpointing(
                    False,
                    "Recompute activations in the backward pass: less memory, about a third more time. The result is the same"
                    " up to rounding.",
                ),
            ],
            outputs=widgets.results(
                MaskedTokenLoraSocket.Output("lora", display_name="lora"),
                "The settings, and the loss before and after training.",
            ),
        )

    @classmethod
    def execute(
        cls,
        model: MaskedTokenModel,
        images: Tensor,
        positive: Conditioning,
        rank: int,
        alpha: float,
        steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        resolution: int,
        checkpoint_every: int,
        checkpoint_prefix: str,
        preview_every: int,
        gradient_checkpointing: bool,
        lora: Lora | None = None,
    ) -> io.NodeOutput:
        settings = LoraTraining(
            steps=steps, batch_size=batch_size, learning_rate=learning_rate, rank=rank, alpha=alpha, seed=seed
        )
        texts = read_prompts(model, positive, "positive")
        resolution = resolution or model.transformer.model.config.sample_size * model.downscale
        with training_gradients():
            training_images = TrainingImages(
                rgb(images), texts, resolution, model.downscale, lambda crops: encode_images(model, crops)
            )
            trainer = _trainer(model, training_images, settings, lora, gradient_checkpointing)
            intervals = dict(checkpoint_every=checkpoint_every, preview_every=preview_every)
            run = _run(model, trainer, prefix=checkpoint_prefix, **intervals)
            result = run.train()
        del trainer, run
        release_memory()
        return io.NodeOutput(*result)


def _trainer(
    model: MaskedTokenModel, images: TrainingImages, settings: LoraTraining, lora: Lora | None, checkpointing: bool
) -> LoraTrainer:
    """A trainer with a copy of the transformer, into which the LoRAs of ``model`` are merged."""
    config, (device, dtype) = model.transformer.model.config, training_device_and_dtype(model.transformer)
    tokens = (images.resolution // model.downscale) ** 2
    free_memory_for(training_bytes(config, dtype, tokens, settings.batch_size), device)
    network = frozen_uvit(config, merged_weights(model.transformer, device, dtype))
    if checkpointing:
        checkpoint_layers(network)
    return LoraTrainer(network, images, settings, lora)


def _run(model: MaskedTokenModel, trainer: LoraTrainer, **options: Any) -> TrainingRun:
    """A training run of ``trainer``; ``options``: prefix, checkpoint_every and preview_every of TrainingRun."""
    return TrainingRun(
        node="TrainMaskedTokenLora",
        loop=trainer.loop,
        output=lambda evaluation: trainer.lora(base_model=model.name),
        write=lambda lora, prefix: write_lora(prefix, *to_file(lora)),
        report=lambda before, after: report(trainer, before.loss, after.loss),
        show=lambda: _preview(model, trainer),
        show_result=False,
        **options,
    )


def _preview(model: MaskedTokenModel, trainer: LoraTrainer) -> Tensor:
    """An image [H, W, 3] of the first prompt, without guidance, which would double the forward passes."""
    side = trainer.images.resolution // model.downscale
    settings = MaskedTokenSettings(codebook=model.codebook, mask_id=model.mask_id, steps=PREVIEW_STEPS)
    unknown = torch.full((1, side, side), model.mask_id, device=model.transformer.load_device)
    uniforms = draw_uniforms(trainer.settings.seed, 1, side, side, PREVIEW_STEPS)
    return decode_tokens(model, decode(unknown, trainer.tokens_to_logits(), settings, uniforms))[0]


NODES: list[type[io.ComfyNode]] = [LoadMaskedTokenLora, TrainMaskedTokenLora, SaveMaskedTokenLora]
