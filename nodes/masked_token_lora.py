"""Styles for masked token models: train a LoRA on one picture or a few, save it, put it on a model.

aMUSEd: An Open MUSE Reproduction (arXiv 2401.01808, section 4), after StyleDrop (arXiv 2306.00983).
"""

import logging
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..host.attachments import Conditioning
from ..host.gradients import make_room
from ..host.training_images import training_gradients
from ..host.training_run import TrainingRun, release_memory, training_place
from ..techniques.masked_tokens.canvas import rgb
from ..techniques.masked_tokens.comfy_lora_files import NONE, lora_files, read_lora, write_lora
from ..techniques.masked_tokens.comfy_model import MaskedTokenModel
from ..techniques.masked_tokens.comfy_run import decode_tokens, encode_pictures, read_prompts
from ..techniques.masked_tokens.comfy_training import add_lora, merged_weights
from ..techniques.masked_tokens.decode import MaskedTokenSettings, decode, draw
from ..techniques.masked_tokens.lora import Lora, check_fits, from_file, to_file
from ..techniques.masked_tokens.training import (
    LoraTrainer,
    LoraTraining,
    Pictures,
    frozen_uvit,
    recompute_layers,
    report,
    training_bytes,
)
from . import training_widgets as widgets
from .checked_inputs import checks_inputs
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
            description="Puts a style on a masked token model: a LoRA file of aMUSEd, or one just trained. Chain several.",
            search_aliases=["aMUSEd LoRA", "StyleDrop", "masked token style"],
            inputs=[
                MaskedTokenModelSocket.Input("model", tooltip="The model, or one that already carries LoRAs."),
                io.Combo.Input(
                    "lora_name",
                    options=lora_files(),
                    default=NONE,
                    tooltip="A .safetensors file in models/loras or output/loras, of the transformer. A wired 'lora' wins.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the style. 0 leaves the model as it is. Useful: 0.5 to 1.5.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="The alpha that it was trained with: its weights count alpha / rank. 0: the file's own, else the"
                    " rank. aMUSEd's published files lost it: of rank 16, their script trained at 32, its 512 style at 1.",
                ),
                MaskedTokenLoraSocket.Input(
                    "lora", optional=True, tooltip="From Train Masked Token LoRA, without a file."
                ),
            ],
            outputs=[
                MaskedTokenModelSocket.Output("model", display_name="model"),
                MaskedTokenLoraSocket.Output("lora", display_name="lora", tooltip="To train it on."),
            ],
        )

    @classmethod
    def execute(
        cls, model: MaskedTokenModel, lora_name: str, strength: float, alpha: float, lora: Lora | None = None
    ) -> io.NodeOutput:
        lora = (lora or _from_file(lora_name)).with_alpha(alpha)
        check_fits(lora, {name: weight.shape for name, weight in model.transformer.model.state_dict().items()})
        if strength != 0.0:
            model = add_lora(model, lora.weights, strength)
        return io.NodeOutput(model, lora)


def _from_file(name: str) -> Lora:
    if name == NONE:
        raise ValueError("no LoRA: choose a file as 'lora_name', or wire 'lora' from Train Masked Token LoRA")
    try:
        lora, text = from_file(*read_lora(name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if text:
        logging.warning(
            "LoadMaskedTokenLora: %d keys of %s are for the text encoder and are left out: load the file with Load LoRA"
            " on the CLIP as well",
            len(text),
            name,
        )
    return lora


@checks_inputs
class SaveMaskedTokenLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveMaskedTokenLora",
            display_name="Save Masked Token LoRA",
            category="chorus/train",
            description="Writes a LoRA in diffusers' layout, with its alpha, into the output folder.",
            search_aliases=["aMUSEd LoRA", "export lora"],
            is_output_node=True,
            inputs=[
                MaskedTokenLoraSocket.Input("lora", tooltip="From Train Masked Token LoRA."),
                io.String.Input(
                    "filename_prefix",
                    default=PREFIX,
                    tooltip="Below the output folder. A number follows; no file is overwritten. Load Masked Token LoRA"
                    " offers what is in loras/.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, lora: Lora, filename_prefix: str) -> io.NodeOutput:
        path = write_lora(filename_prefix, *to_file(lora))
        logging.info("SaveMaskedTokenLora: %s", path)
        return io.NodeOutput()


@checks_inputs
class TrainMaskedTokenLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainMaskedTokenLora",
            display_name="Train Masked Token LoRA",
            category="chorus/train",
            description="Teaches a masked token model (aMUSEd) the style of one picture or a few, as a LoRA.",
            search_aliases=["aMUSEd LoRA", "StyleDrop", "train lora", "style from one image"],
            is_experimental=True,
            inputs=[
                MaskedTokenModelSocket.Input(
                    "model", tooltip="The model. LoRAs that it carries are trained on top of."
                ),
                io.Image.Input(
                    "images",
                    tooltip="One picture or a batch, of any size: the short side is fitted to the resolution, and squares"
                    " are cut out at random.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the pictures show, such as 'A mushroom in [V] style': one prompt for all, or one for"
                    " each, joined with Conditioning (Combine).",
                ),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Size of the LoRA. The papers use 16."),
                io.Float.Input(
                    "alpha",
                    default=32.0,
                    min=0.01,
                    max=1024.0,
                    step=0.5,
                    tooltip="The change counts alpha / rank. aMUSEd's scripts use 32; for a style of one picture at 512"
                    " pixels 1, with a learning rate of 1e-3. Programs that cannot read it from the file assume the rank.",
                ),
                widgets.steps(1500, "For one picture, 1500 to 2000 in the papers."),
                widgets.batch_size(1, "Crops per step. 1 for one picture, 8 to 16 for many."),
                widgets.learning_rate(
                    4e-4,
                    "AdamW, constant. One picture: 4e-4 at 256 pixels, 1e-3 with alpha 1 at 512. Many: 8e-4 and 1e-4.",
                ),
                widgets.seed("Of the first weights, the crops, the masks."),
                MaskedTokenLoraSocket.Input(
                    "lora",
                    optional=True,
                    tooltip="Train this one on, with the same rank and alpha; the optimizer starts afresh. Wire the model"
                    " without it.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    advanced=True,
                    tooltip="Side of the square crops in pixels. 0: the model's own.",
                ),
                *widgets.checkpoints(PREFIX),
                widgets.preview_every(
                    "Show a picture of the first prompt on the node after every so many steps. 0: never."
                ),
                widgets.gradient_checkpointing(
                    False, "Less memory for about a third more time; the same result to rounding."
                ),
            ],
            outputs=widgets.results(
                MaskedTokenLoraSocket.Output("lora", display_name="lora"), "The settings, and whether it learned."
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
            pictures = Pictures(
                rgb(images), texts, resolution, model.downscale, lambda crops: encode_pictures(model, crops)
            )
            trainer = _trainer(model, pictures, settings, lora, gradient_checkpointing)
            keep = dict(checkpoint_every=checkpoint_every, preview_every=preview_every)
            run = _run(model, trainer, prefix=checkpoint_prefix, **keep)
            result = run.train()
        del trainer, run
        release_memory()
        return io.NodeOutput(*result)


def _trainer(
    model: MaskedTokenModel, pictures: Pictures, settings: LoraTraining, lora: Lora | None, checkpointing: bool
) -> LoraTrainer:
    """On a copy of the transformer, with the LoRAs that it carries merged."""
    config, (device, dtype) = model.transformer.model.config, training_place(model.transformer)
    tokens = (pictures.resolution // model.downscale) ** 2
    make_room(training_bytes(config, dtype, tokens, settings.batch_size), device)
    network = frozen_uvit(config, merged_weights(model.transformer, device, dtype))
    if checkpointing:
        recompute_layers(network)
    return LoraTrainer(network, pictures, settings, lora)


def _run(model: MaskedTokenModel, trainer: LoraTrainer, **keep: Any) -> TrainingRun:
    """``keep``: as TrainingRun has it, from prefix to preview_every."""
    return TrainingRun(
        node="TrainMaskedTokenLora",
        loop=trainer.loop,
        learned=lambda evaluation: trainer.lora(base_model=model.name),
        write=lambda lora, prefix: write_lora(prefix, *to_file(lora)),
        report=lambda before, after: report(trainer, before.loss, after.loss),
        show=lambda: _preview(model, trainer),
        show_result=False,
        **keep,
    )


def _preview(model: MaskedTokenModel, trainer: LoraTrainer) -> Tensor:
    """A picture [H, W, 3] of the first prompt, without guidance, which would cost a second pass."""
    side = trainer.pictures.resolution // model.downscale
    settings = MaskedTokenSettings(codebook=model.codebook, mask_id=model.mask_id, steps=PREVIEW_STEPS)
    unknown = torch.full((1, side, side), model.mask_id, device=model.transformer.load_device)
    draws = draw(trainer.settings.seed, 1, side, side, PREVIEW_STEPS)
    return decode_tokens(model, decode(unknown, trainer.tokens_to_logits(), settings, draws))[0]


NODES: list[type[io.ComfyNode]] = [LoadMaskedTokenLora, TrainMaskedTokenLora, SaveMaskedTokenLora]
