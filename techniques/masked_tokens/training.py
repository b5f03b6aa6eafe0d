"""LoRA training of a masked token model on the tokens of one or a few images, to learn their style.

aMUSEd: An Open MUSE Reproduction (arXiv 2401.01808, section 4) after StyleDrop (arXiv 2306.00983). As in the authors'
fine-tuning script, each step crops the images at random and masks a share cos(π r / 2) of the tokens, with r uniform
in 0..1. It trains the network to predict the ids of the masked tokens. There are two deliberate differences:
- The prompt is never dropped. The script inverts the probability: it keeps the prompt only in the share of samples
  that should lose it.
- The batch of a step depends only on the seed and the step, so that a resumed run has the same batches as an
  uninterrupted run.

Shapes: B samples, L text tokens, h and w tokens of height and width.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...training.generators import seeded_generator
from ...training.loop import Evaluation, Training, TrainingLoop
from ...training.report_lines import improvement
from ...training.resize import fit_short_side
from ...training.sampling import shuffled
from .lora import Lora, attach, check_resume, current_lora, initial_lora
from .networks.uvit import UViT, UViTConfig

AESTHETIC = 6.0  # the score with which aMUSEd is trained and sampled
FIXED_MASKS = 8  # masks per image for the loss before and after training
FIXED_IMAGES = 8  # maximum number of images for this loss
BETAS, WEIGHT_DECAY = (0.9, 0.999), 1e-2
INIT, ORDER, MASKS, FIXED = 1, 2, 3, 4  # parts of the keys that seed random generators

Encode = Callable[[Tensor], Tensor]  # images [B, H, W, 3] in 0..1 -> token ids [B, h, w]
Text = tuple[Tensor, Tensor]  # states [1, L, C], pooled [1, C]


@dataclass(frozen=True, kw_only=True)
class LoraTraining(Training):
    """Settings; the defaults are those of aMUSEd's fine-tuning script for 256 pixels, which has no EMA."""

    steps: int = 1500
    batch_size: int = 1
    learning_rate: float = 4e-4
    rank: int = 16
    alpha: float = 32.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} is less than 1; use at least 1")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"alpha {self.alpha:g} is not a finite number above 0; use 32 as aMUSEd does")


class Batch(NamedTuple):
    """The inputs of one forward pass."""

    tokens: Tensor  # [B, h, w] ids
    mask: Tensor  # [B, h, w] bool, true where the id is to be predicted
    text: Tensor  # [B, L, C]
    pooled: Tensor  # [B, C]
    micro: Tensor  # [B, 5]


def frozen_uvit(config: UViTConfig, weights: dict[str, Tensor]) -> UViT:
    """A frozen U-ViT of plain torch layers with ``weights``."""
    with torch.device("meta"):
        network = UViT(config)
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def training_bytes(config: UViTConfig, dtype: torch.dtype, tokens: int, batch_size: int) -> int:
    """An estimate of the memory of training in bytes: weights, activations stored for the gradients, and logits."""
    layers = config.num_hidden_layers * (24 * config.hidden_size + 8 * config.intermediate_size)
    ends = 2 * config.num_res_blocks * 48 * config.block_out_channels + 4 * config.codebook_size
    with torch.device("meta"):
        weights = sum(p.numel() for p in UViT(config).parameters())
    return dtype.itemsize * (weights + batch_size * tokens * (ends + layers // (4 if config.downsample else 1)))


def checkpoint_layers(network: UViT) -> None:
    """Use gradient checkpointing in every transformer layer."""
    for layer in network.transformer_layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


class TrainingImages:
    """Training images: the tokens of crops with their prompts and micro-conditioning."""

    def __init__(self, images: Tensor, texts: Sequence[Text], resolution: int, downscale: int, encode: Encode) -> None:
        """``images`` [N, H, W, 3] in 0..1, of any size; ``texts``: one for all or one per image. Crops are square."""
        if resolution < downscale or resolution % downscale:
            raise ValueError(
                f"resolution {resolution} cannot be divided into tokens of {downscale}x{downscale} pixels;"
                f" use a multiple of {downscale}, or 0 for the model's resolution"
            )
        if len(texts) not in (1, len(images)):
            raise ValueError(
                f"got {len(texts)} prompts for {len(images)} images; connect one prompt for all, or one for each"
            )
        self.height, self.width = images.shape[1:3]
        self.resolution, self.texts = resolution, texts
        self.pixels = fit_short_side(images[..., :3].float(), resolution)
        # the largest top and left of a crop
        self.room = self.pixels.shape[1] - resolution, self.pixels.shape[2] - resolution
        self.tokens = functools.lru_cache(maxsize=1024)(functools.partial(self._encode, encode))

    def __len__(self) -> int:
        return len(self.pixels)

    def _encode(self, encode: Encode, index: int, top: int, left: int) -> Tensor:
        size = self.resolution
        return encode(self.pixels[index : index + 1, top : top + size, left : left + size]).cpu()  # [1, h, w]

    def check_batch(self, batch_size: int) -> None:
        lengths = sorted({states.shape[1] for states, _ in self.texts})
        if batch_size > 1 and len(lengths) > 1:
            raise ValueError(
                f"prompts of {lengths[0]} to {lengths[-1]} tokens cannot be in one batch of {batch_size};"
                " use batch_size 1, or prompts of the same length"
            )

    def batch(self, crops: Sequence[tuple[int, int, int]], masks: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of ``crops`` (index, top, left); ``masks(tokens)`` returns the mask of their tokens."""
        tokens = torch.cat([self.tokens(*crop) for crop in crops])
        texts = [self.texts[index % len(self.texts)] for index, _, _ in crops]
        micro = [[self.width, self.height, top, left, AESTHETIC] for _, top, left in crops]
        states, pooled = (torch.cat(parts) for parts in zip(*texts))
        return Batch(tokens, masks(tokens), states, pooled, torch.tensor(micro, dtype=torch.float32))

    def index_at(self, seed: int, position: int) -> int:
        """The index of the image for the sample at ``position`` in the run."""
        return shuffled(len(self), position, seed, ORDER)


def random_mask(share: float, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Bool [1, h, w]: a random ``share`` of the tokens of one sample, at least one."""
    count = max(1, round(share * tokens.numel()))
    rank = torch.randperm(tokens.numel(), generator=generator)
    return (rank < count).view(tokens.shape)


def masked_loss(network: UViT, batch: Batch) -> Tensor:
    """Mean cross-entropy at the masked tokens, in nats, float32; ln(codebook size) for a uniform prediction.

    The conditioning is computed here, with gradients, because the LoRA also trains the keys and values of the text.
    """
    weight = network.encoder_proj.weight
    places = batch.mask.flatten().nonzero().flatten()  # on the CPU: on a GPU, nonzero waits for queued work
    tokens, mask, text, pooled, micro, places = (t.to(weight.device) for t in (*batch, places))
    conditioning = network.condition(text.to(weight.dtype), pooled, micro)
    logits = network(tokens.masked_fill(mask, network.config.vocab_size - 1), conditioning)
    predicted = logits.movedim(1, -1).flatten(0, 2)[places]
    return F.cross_entropy(predicted.float(), tokens.flatten()[places])


class LoraTrainer:
    """Trains a LoRA: ``loop`` is the training loop, ``lora()`` returns the current LoRA."""

    def __init__(
        self, network: UViT, images: TrainingImages, settings: LoraTraining, resume: Lora | None = None
    ) -> None:
        """``network`` is modified, so pass a copy. ``resume``: a LoRA to continue from, with a new optimizer state."""
        images.check_batch(settings.batch_size)
        if resume is not None:
            check_resume(resume, network, settings.rank, settings.alpha)
        start = resume or initial_lora(network, settings.rank, settings.alpha, seeded_generator(settings.seed, INIT))
        self.settings, self.network, self.images, self.layers = settings, network, images, attach(network, start)
        parameters: list[Tensor] = [p for layer in self.layers.values() for p in (layer.down, layer.up)]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.loop = TrainingLoop(
            settings=settings,
            optimizer=optimizer,
            parameters=parameters,
            batches=self._batches,
            backward=self._backward,
            measure=lambda: Evaluation(self.fixed_loss()),
            keep_best=False,  # the loss on the training images nearly always falls until the end
            first_step=start.steps,
        )

    def _batches(self, step: int) -> Iterator[Batch]:
        parts = zip(*(t.split(self.settings.batch_size) for t in self.batch_at(self.loop.first_step + step)))
        return (Batch(*part) for part in parts)

    def _backward(self, step: int, number: int, batch: Batch) -> dict[str, Tensor]:
        loss = masked_loss(self.network, batch)
        (loss / self.settings.gradient_accumulation).backward()
        return {"loss": loss}

    def batch_at(self, step: int) -> Batch:
        """All samples of a step, for all batches of gradient accumulation."""
        size, seed = self.settings.samples, self.settings.seed
        generator = seeded_generator(seed, MASKS, step)
        indices = [self.images.index_at(seed, step * size + i) for i in range(size)]
        tops, lefts = (torch.randint(room + 1, (size,), generator=generator).tolist() for room in self.images.room)
        shares = [math.cos(r * math.pi / 2) for r in torch.rand(size, generator=generator).tolist()]

        def masks(tokens: Tensor) -> Tensor:
            return torch.cat([random_mask(share, row, generator) for share, row in zip(shares, tokens.split(1))])

        return self.images.batch(list(zip(indices, tops, lefts)), masks)

    @torch.no_grad()
    def fixed_loss(self) -> float:
        """The loss on fixed masks and center crops of the training images, comparable between steps and runs."""
        top, left = (room // 2 for room in self.images.room)
        losses = []
        for index in range(min(len(self.images), FIXED_IMAGES)):
            for i in range(FIXED_MASKS):
                share = math.cos((i + 0.5) / FIXED_MASKS * math.pi / 2)
                masks = functools.partial(random_mask, share, generator=seeded_generator(0, FIXED, index, i))
                losses.append(float(masked_loss(self.network, self.images.batch([(index, top, left)], masks))))
        return math.fsum(losses) / len(losses)

    def lora(self, **facts: str) -> Lora:
        """The current LoRA; ``facts`` about the run are stored with it."""
        settings = {key: getattr(self.settings, key) for key in ("batch_size", "learning_rate", "seed")}
        return current_lora(
            self.layers, settings | {"resolution": self.images.resolution, "steps": self.loop.steps} | facts
        )

    @torch.no_grad()
    def tokens_to_logits(self, index: int = 0) -> Callable[[Tensor, int], Tensor]:
        """The ``tokens_to_logits`` argument of ``decode.decode`` for a preview, with the prompt of image ``index``."""
        weight, size = self.network.encoder_proj.weight, self.images.resolution
        states, pooled = (t.to(weight.device) for t in self.images.texts[index])
        micro = torch.tensor([[size, size, 0, 0, AESTHETIC]], dtype=torch.float32, device=weight.device)
        conditioning = self.network.condition(states.to(weight.dtype), pooled, micro)
        return lambda ids, step: self.network(ids.to(weight.device), conditioning)


def report(trainer: LoraTrainer, before: float, after: float) -> str:
    """A short report of a run; ``before`` and ``after`` are losses on fixed masks."""
    settings, images, loop, losses = trainer.settings, trainer.images, trainer.loop, trainer.loop.losses["loss"]
    weights = sum(p.numel() for p in loop.parameters)
    window = max(1, min(50, len(losses) // 5))
    first, last = (math.fsum(part) / len(part) for part in (losses[:window], losses[-window:]))
    resumed = f", resumed at step {loop.first_step}" if loop.resumed else ""
    return "\n".join(
        [
            f"{settings.steps} steps of batch {settings.batch_size} at learning rate {settings.learning_rate:g},"
            f" seed {settings.seed}{resumed}",
            f"rank {settings.rank}, alpha {settings.alpha:g}: {weights} weights in {len(trainer.layers)} layers",
            f"{len(images)} image(s) of {images.width}x{images.height}, crops of {images.resolution}",
            f"loss of the first {window} steps {first:.4f}, of the last {window} {last:.4f} (nats per masked token;"
            f" uniform prediction: {math.log(trainer.network.config.codebook_size):.4f})",
            f"loss on fixed masks of the training images: {before:.4f} before, {after:.4f} after: {improvement(before, after)}",
            "This loss measures how well the training images are memorized, not how well the style transfers: check samples.",
        ]
    )
