"""A style learned by a masked token model from one picture or a few: a LoRA trained on their tokens.

aMUSEd: An Open MUSE Reproduction (arXiv 2401.01808, section 4) after StyleDrop (arXiv 2306.00983), by the steps of the
authors' fine-tuning script: crop at random, mask a share cos(π r / 2) of the tokens with r uniform in 0..1, and ask for
their ids. Two deliberate differences: the prompt is never dropped (the script keeps it only in the share of samples
that it says it drops), and the draws of a step depend on the seed and its number alone, so that a resumed run goes on
with the draws that it would have had.

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
from ...training.report_lines import verdict
from ...training.resize import fit_short_side
from ...training.sampling import shuffled
from .lora import Lora, attach, check_resume, fresh, learned
from .networks.uvit import UViT, UViTConfig

AESTHETIC = 6.0  # the score with which aMUSEd is trained and sampled
FIXED_MASKS = 8  # per picture, to compare before and after
FIXED_PICTURES = 8  # at most, that the comparison looks at
BETAS, WEIGHT_DECAY = (0.9, 0.999), 1e-2
INIT, ORDER, MASKS, FIXED = 1, 2, 3, 4  # what a generator is for, in its key

Encode = Callable[[Tensor], Tensor]  # pictures [B, H, W, 3] in 0..1 -> token ids [B, h, w]
Text = tuple[Tensor, Tensor]  # states [1, L, C], pooled [1, C]


@dataclass(frozen=True, kw_only=True)
class LoraTraining(Training):
    """The defaults are those of aMUSEd's fine-tuning script for a model of 256 pixels, which averages no weights."""

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
            raise ValueError(f"alpha {self.alpha:g} is not a positive number; aMUSEd uses 32")


class Batch(NamedTuple):
    """What one step looks at."""

    tokens: Tensor  # [B, h, w] ids
    mask: Tensor  # [B, h, w] bool, true where the id is asked for
    text: Tensor  # [B, L, C]
    pooled: Tensor  # [B, C]
    micro: Tensor  # [B, 5]


def frozen_uvit(config: UViTConfig, weights: dict[str, Tensor]) -> UViT:
    """A U-ViT of plain layers around ``weights``, frozen."""
    with torch.device("meta"):
        network = UViT(config)
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def training_bytes(config: UViTConfig, dtype: torch.dtype, tokens: int, batch_size: int) -> int:
    """About what training takes: the weights, what the layers keep for their gradients, the logits."""
    layers = config.num_hidden_layers * (24 * config.hidden_size + 8 * config.intermediate_size)
    ends = 2 * config.num_res_blocks * 48 * config.block_out_channels + 4 * config.codebook_size
    with torch.device("meta"):
        weights = sum(p.numel() for p in UViT(config).parameters())
    return dtype.itemsize * (weights + batch_size * tokens * (ends + layers // (4 if config.downsample else 1)))


def recompute_layers(network: UViT) -> None:
    """Have every transformer layer compute anew for its gradients what it would else keep."""
    for layer in network.transformer_layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


class Pictures:
    """The tokens of random crops, with their prompts and what the micro-conditioning says of them."""

    def __init__(self, images: Tensor, texts: Sequence[Text], resolution: int, downscale: int, encode: Encode) -> None:
        """``images`` [N, H, W, 3] in 0..1, of any size; one text for all or one for each; square crops."""
        if resolution < downscale or resolution % downscale:
            raise ValueError(
                f"resolution {resolution} does not divide into tokens of {downscale} pixels;"
                f" use a multiple of {downscale}, or 0 for the model's own"
            )
        if len(texts) not in (1, len(images)):
            raise ValueError(
                f"{len(texts)} prompts for {len(images)} pictures; wire one prompt for all, or one for each"
            )
        self.height, self.width = images.shape[1:3]
        self.resolution, self.texts = resolution, texts
        self.pixels = fit_short_side(images[..., :3].float(), resolution)
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
                " use batch_size 1, or prompts of one length"
            )

    def batch(self, crops: Sequence[tuple[int, int, int]], masks: Callable[[Tensor], Tensor]) -> Batch:
        """The samples (index, top, left), with the ``masks`` of their tokens."""
        tokens = torch.cat([self.tokens(*crop) for crop in crops])
        texts = [self.texts[index % len(self.texts)] for index, _, _ in crops]
        micro = [[self.width, self.height, top, left, AESTHETIC] for _, top, left in crops]
        states, pooled = (torch.cat(parts) for parts in zip(*texts))
        return Batch(tokens, masks(tokens), states, pooled, torch.tensor(micro, dtype=torch.float32))

    def index_at(self, seed: int, position: int) -> int:
        """The picture at a position of the run."""
        return shuffled(len(self), position, seed, ORDER)


def mask_of(share: float, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Bool [1, h, w]: that share of the tokens of one sample, at least one, at random."""
    count = max(1, round(share * tokens.numel()))
    rank = torch.randperm(tokens.numel(), generator=generator)
    return (rank < count).view(tokens.shape)


def masked_loss(network: UViT, batch: Batch) -> Tensor:
    """Mean cross-entropy at the masked tokens, in nats, float32; ln of the codebook for one that knows nothing.

    The text is read anew, with gradients: its keys and values are layers that a LoRA trains.
    """
    weight = network.encoder_proj.weight
    tokens, mask, *cond = (t.to(weight.device) for t in batch)
    text, pooled, micro = cond
    conditioning = network.condition(text.to(weight.dtype), pooled, micro)
    logits = network(tokens.masked_fill(mask, network.config.vocab_size - 1), conditioning)
    return F.cross_entropy(logits.movedim(1, -1)[mask].float(), tokens[mask])


class LoraTrainer:
    """What ``loop`` trains a LoRA by; ``lora()`` is what it has learned so far."""

    def __init__(self, network: UViT, pictures: Pictures, settings: LoraTraining, resume: Lora | None = None) -> None:
        """``network`` is changed: give it a copy. ``resume``: go on with these weights, with a fresh optimizer."""
        pictures.check_batch(settings.batch_size)
        if resume is not None:
            check_resume(resume, network, settings.rank, settings.alpha)
        start = resume or fresh(network, settings.rank, settings.alpha, seeded_generator(settings.seed, INIT))
        self.settings, self.network, self.pictures, self.layers = settings, network, pictures, attach(network, start)
        parameters: list[Tensor] = [p for layer in self.layers.values() for p in (layer.down, layer.up)]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.loop = TrainingLoop(
            settings=settings,
            optimizer=optimizer,
            parameters=parameters,
            batches=self._batches,
            backward=self._backward,
            measure=lambda: Evaluation(self.fixed_loss()),
            keep_best=False,  # by the loss on the training pictures the last is nearly always the best
            first_step=start.steps,
        )

    def _batches(self, step: int) -> Iterator[Batch]:
        parts = zip(*(t.split(self.settings.batch_size) for t in self.draw(self.loop.first_step + step)))
        return (Batch(*part) for part in parts)

    def _backward(self, step: int, number: int, batch: Batch) -> dict[str, Tensor]:
        loss = masked_loss(self.network, batch)
        (loss / self.settings.gradient_accumulation).backward()
        return {"loss": loss}

    def draw(self, step: int) -> Batch:
        """The samples of a step."""
        size, seed = self.settings.samples, self.settings.seed
        generator = seeded_generator(seed, MASKS, step)
        indices = [self.pictures.index_at(seed, step * size + i) for i in range(size)]
        tops, lefts = (torch.randint(room + 1, (size,), generator=generator).tolist() for room in self.pictures.room)
        shares = [math.cos(r * math.pi / 2) for r in torch.rand(size, generator=generator).tolist()]

        def masks(tokens: Tensor) -> Tensor:
            return torch.cat([mask_of(share, row, generator) for share, row in zip(shares, tokens.split(1))])

        return self.pictures.batch(list(zip(indices, tops, lefts)), masks)

    @torch.no_grad()
    def fixed_loss(self) -> float:
        """The loss on masks that are the same in every run, at the middle of the pictures: comparable over a run."""
        top, left = (room // 2 for room in self.pictures.room)
        losses = []
        for index in range(min(len(self.pictures), FIXED_PICTURES)):
            for i in range(FIXED_MASKS):
                share = math.cos((i + 0.5) / FIXED_MASKS * math.pi / 2)
                masks = functools.partial(mask_of, share, generator=seeded_generator(0, FIXED, index, i))
                losses.append(float(masked_loss(self.network, self.pictures.batch([(index, top, left)], masks))))
        return math.fsum(losses) / len(losses)

    def lora(self, **facts: str) -> Lora:
        """What has been learned so far; ``facts`` about the run are kept with it."""
        own = {key: getattr(self.settings, key) for key in ("batch_size", "learning_rate", "seed")}
        return learned(self.layers, own | {"resolution": self.pictures.resolution, "steps": self.loop.steps} | facts)

    @torch.no_grad()
    def tokens_to_logits(self, index: int = 0) -> Callable[[Tensor, int], Tensor]:
        """For a preview: the network with the prompt of a picture, as ``techniques.masked_tokens.decode`` asks it."""
        weight, size = self.network.encoder_proj.weight, self.pictures.resolution
        states, pooled = (t.to(weight.device) for t in self.pictures.texts[index])
        micro = torch.tensor([[size, size, 0, 0, AESTHETIC]], dtype=torch.float32, device=weight.device)
        conditioning = self.network.condition(states.to(weight.dtype), pooled, micro)
        return lambda ids, step: self.network(ids.to(weight.device), conditioning)


def report(trainer: LoraTrainer, before: float, after: float) -> str:
    """The report of a run, in a few lines; ``before``, ``after``: losses on fixed masks."""
    settings, pictures, loop, losses = trainer.settings, trainer.pictures, trainer.loop, trainer.loop.losses["loss"]
    weights = sum(p.numel() for p in loop.parameters)
    window = max(1, min(50, len(losses) // 5))
    first, last = (math.fsum(part) / len(part) for part in (losses[:window], losses[-window:]))
    resumed = f", resumed at step {loop.first_step}" if loop.resumed else ""
    return "\n".join(
        [
            f"{settings.steps} steps of batch {settings.batch_size} at learning rate {settings.learning_rate:g},"
            f" seed {settings.seed}{resumed}",
            f"rank {settings.rank}, alpha {settings.alpha:g}: {weights} weights in {len(trainer.layers)} layers",
            f"{len(pictures)} picture(s) of {pictures.width}x{pictures.height}, crops of {pictures.resolution}",
            f"loss of the first {window} steps {first:.4f}, of the last {window} {last:.4f} (nats per masked token;"
            f" guessing: {math.log(trainer.network.config.codebook_size):.4f})",
            f"loss on fixed masks of the training pictures: {before:.4f} before, {after:.4f} after: {verdict(before, after)}",
            "It says how well these pictures are known by heart, not how well the style carries over: look at samples.",
        ]
    )
