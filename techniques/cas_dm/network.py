"""The head φ of a cascade: a small U-Net that refines the x0 of a frozen model and predicts a gate r.

Cas-DM (arXiv 2401.02414), a reimplementation: the paper has no public code and does not specify the inputs of φ or the
gate. Here the inputs are x̂_θ and the noise level, optionally also x_t, and

    x_φ = x̂_θ + n / √(s² + n²) · F(x̂_θ, level)         r = σ(G(x̂_θ, level))

F and G are outputs of the last layer of one U-Net, and σ is the sigmoid. s and n are the amplitudes of signal and noise
in x_t. Without noise (n = 0), x̂_θ is the image and x_φ = x̂_θ. The last layer is initialised to zero, so that a new
head has x_φ = x̂_θ.

The noise level is ln(n / s), half of the negative log-SNR. At the same signal-to-noise ratio it is equal for eps, v and
flow models, whatever their sigmas and shifts.

A head with the default widths for latents of 4 channels has 0.96 million weights (1.9 MB in float16) and needs 2.3
GFLOP at 64x64. One prediction of SD 1.5 needs 803 GFLOP, and a step with guidance needs two predictions. The operations
were counted by torch, which counts a multiplication followed by an addition as two.

Shapes: B samples, C channels of the latent, any h and w.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.operations import Operations
from ...common.settings import check_choice
from ...common.shapes import size_of
from ...common.weights import PACKED, load, shorten

FORMAT = "chorus-cas-dm-1"  # the "format" in the metadata of a file
GATES = ("pixel", "channel", "sample", "fixed")
GROUPS = 8  # number of groups of each GroupNorm; widths are multiples of this number
FREQUENCIES = 16  # number of frequencies in the embedding of the noise level
MAX_LEVELS = 6  # resolutions of the U-Net
MAX_CHANNELS = 2**16  # of any layer


@dataclass(frozen=True, kw_only=True)
class CasDMHeadConfig:
    """Architecture of a head.

    ``gate``: whether the head predicts one r per latent position ("pixel"), per position and channel ("channel") or per
    sample ("sample"), or r is the constant ``fixed`` ("fixed").
    """

    channels: int
    widths: tuple[int, ...] = (64, 64, 96)  # channels at each resolution; each resolution is half the previous one
    embedding: int = 128  # size of the embedded noise level
    condition_on_x_t: bool = False  # whether x_t, scaled to unit variance, is an input besides x̂_θ
    gate: str = "pixel"
    fixed: float = 0.5  # r of the gate "fixed"

    def __post_init__(self) -> None:
        if not (1 <= self.channels <= MAX_CHANNELS and 1 <= self.embedding <= MAX_CHANNELS):
            raise ValueError(
                f"channels {self.channels} or embedding {self.embedding} is not between 1 and {MAX_CHANNELS}; use the"
                " number of latent channels, and 128 for embedding"
            )
        if not 1 <= len(self.widths) <= MAX_LEVELS or any(
            w % GROUPS or not GROUPS <= w <= MAX_CHANNELS for w in self.widths
        ):
            raise ValueError(
                f"expected 1 to {MAX_LEVELS} widths, all multiples of {GROUPS} up to {MAX_CHANNELS}, got {self.widths};"
                " use for example 64, 64, 96"
            )
        check_choice("gate", self.gate, GATES)
        if not 0.0 <= self.fixed <= 1.0:
            raise ValueError(f"fixed {self.fixed} is not between 0 and 1; use 0.5 for equal weights")

    @property
    def gates(self) -> int:
        """Channels of the last layer that predict r."""
        return {"pixel": 1, "channel": self.channels, "sample": 1, "fixed": 0}[self.gate]

    @classmethod
    def from_json(cls, text: str) -> "CasDMHeadConfig":
        """The config in the JSON ``text`` of a file. A ValueError if ``to_json`` cannot have written it."""
        try:
            values, names = json.loads(text), {f.name for f in dataclasses.fields(cls)}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its config is not valid JSON ({error}): {text[:80]}") from error
        if isinstance(values, dict) and "sees_x" in values:  # former name of condition_on_x_t; plain: ok
            values["condition_on_x_t"] = values.pop("sees_x")  # plain: ok
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"its config is {text[:80]}; expected exactly the keys {', '.join(sorted(names))}")
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        wrong = [name for name, kind in kinds.items() if not _has_type(kind, values[name])]
        if wrong:
            raise ValueError(f"its config has no valid {', '.join(wrong)}: {text[:200]}")
        values["widths"] = tuple(values["widths"])
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def _has_type(kind: Any, value: Any) -> bool:
    if kind == tuple[int, ...]:
        return isinstance(value, list) and all(type(v) is int for v in value)
    return type(value) in ((int, float) if kind is float else (kind,))


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """Facts about the training of a head. The first three are compared with the model that the head is applied to."""

    latent_format: str  # class name of ComfyUI's latent format
    prediction: str  # prediction type of the frozen model θ: eps, v, flow, ...
    cfg: float  # guidance scale of the model's predictions in training
    steps: int = 0
    data: str = ""
    gate: tuple[tuple[float, float], ...] = ()  # (sampling percent from 0 to 1, mean r)
    details: Mapping[str, str] = field(default_factory=dict)  # further metadata: losses, metric, ...


@dataclass(frozen=True, eq=False)
class Head:
    """An immutable head: the value of a CAS_DM_HEAD socket.

    It is the result of a training, and a later training can continue from it.
    """

    config: CasDMHeadConfig
    weights: Mapping[str, Tensor]  # on the CPU; never modified
    facts: HeadFacts

    def network(self, operations: Operations = nn) -> "CasDMHeadNet":
        """φ with a copy of these weights in float32, frozen. A ValueError if the weights do not fit the config.

        ``operations``: layer classes. ComfyUI's casting layers let ComfyUI move the weights between devices.
        """
        weights = {name: _float32_copy(w) for name, w in self.weights.items()}
        return load(CasDMHeadNet, self.config, weights, operations)


def _float32_copy(weight: Any) -> Any:
    floating = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype != PACKED
    return weight.to(torch.float32, copy=True) if floating else weight


def new_head(config: CasDMHeadConfig, facts: HeadFacts, generator: torch.Generator) -> Head:
    """An untrained head: x_φ is x̂_θ, r is 0.5 (or ``fixed``)."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in CasDMHeadNet(config).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if name.startswith("last.") or ".conv2." in name or name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        elif len(shape) == 1:  # scales of the GroupNorms
            weights[name] = torch.ones(shape)
        else:
            spread = shape[1:].numel() ** -0.5
            weights[name] = spread * torch.randn(shape, generator=generator, dtype=torch.float32)
    return Head(config, weights, facts)


class ResBlock(nn.Module):
    def __init__(self, width: int, out: int, embedding: int, operations: Operations) -> None:
        super().__init__()
        self.norm1 = operations.GroupNorm(GROUPS, width)
        self.conv1 = operations.Conv2d(width, out, 3, padding=1)
        self.level = operations.Linear(embedding, 2 * out)
        self.norm2 = operations.GroupNorm(GROUPS, out)
        self.conv2 = operations.Conv2d(out, out, 3, padding=1)
        self.skip = operations.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.level(embedding)[:, :, None, None].chunk(2, dim=1)  # [B, out, 1, 1] each
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return self.skip(x) + h


class LevelEmbedding(nn.Module):
    """Embedding of the noise level by waves and two layers: ln(n / s) [B] -> [B, size]."""

    def __init__(self, size: int, operations: Operations) -> None:
        super().__init__()
        self.linear1 = operations.Linear(2 * FREQUENCIES, size)
        self.linear2 = operations.Linear(size, size)

    def forward(self, level: Tensor) -> Tensor:
        # the lowest frequency, e^-3, has an eighth of a period over the range of all levels; the highest, e^3, has a
        # period of 0.31
        exponents = torch.linspace(-3.0, 3.0, FREQUENCIES, dtype=torch.float32, device=level.device)
        angles = level.float()[:, None] * torch.exp(exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(level.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(waves))))


class CasDMHeadNet(nn.Module):
    """The network φ. It computes in the dtype of its input.

    Any height and width: downsampling rounds sizes up, and upsampling resizes to the size of the skip connection.
    """

    def __init__(self, config: CasDMHeadConfig, operations: Operations = nn) -> None:
        super().__init__()
        self.config = config
        widths, size = config.widths, config.embedding
        self.embed = LevelEmbedding(size, operations)
        self.first = operations.Conv2d(config.channels * (2 if config.condition_on_x_t else 1), widths[0], 3, padding=1)
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(ResBlock(w, w, size, operations) for w in widths)
        self.shrink = nn.ModuleList(operations.Conv2d(w, below, 3, stride=2, padding=1) for w, below in pairs)
        self.middle = ResBlock(widths[-1], widths[-1], size, operations)
        self.grow = nn.ModuleList(operations.Conv2d(below, w, 1) for w, below in pairs)
        self.up = nn.ModuleList(ResBlock(2 * w, w, size, operations) for w, _ in pairs)
        self.norm = operations.GroupNorm(GROUPS, widths[0])
        self.last = operations.Conv2d(widths[0], config.channels + config.gates, 3, padding=1)

    def forward(self, x0: Tensor, level: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_φ [B, C, h, w] and r, which broadcasts to that shape.

        x0     [B, C, h, w]: x̂_θ in the scale of the model
        level  [B]: ln(n / s), finite
        x      [B, C, h, w]: x_t / √(s² + n²); required with ``condition_on_x_t``, else ignored
        """
        if x0.ndim != 4 or x0.shape[1] != self.config.channels:
            raise ValueError(
                f"expected latents [B, {self.config.channels}, h, w] for this head, got {size_of(x0)}; use a head and latents"
                " of the same model"
            )
        inputs = x0
        if self.config.condition_on_x_t:
            if x is None:
                raise ValueError("this head is conditioned on x_t; pass x as well")
            inputs = torch.cat([x0, x.to(x0)], dim=1)
        level = level.to(x0.dtype)
        embedding = self.embed(level)
        h = self.first(inputs)

        skips = []
        for block, shrink in zip(self.down, self.shrink, strict=False):
            h = block(h, embedding)
            skips.append(h)
            h = shrink(h)
        h = self.middle(self.down[-1](h, embedding), embedding)
        for i, skip in reversed(list(enumerate(skips))):
            h = F.interpolate(self.grow[i](h), size=skip.shape[-2:], mode="nearest")
            h = self.up[i](torch.cat([h, skip], dim=1), embedding)

        change, gate = self.last(F.silu(self.norm(h))).split([self.config.channels, self.config.gates], dim=1)
        share = torch.sigmoid(2 * level).sqrt()[:, None, None, None]  # n / √(s² + n²)
        return x0 + share * change, self._gate(gate)

    def _gate(self, gate: Tensor) -> Tensor:
        if self.config.gate == "fixed":
            return gate.new_full((1, 1, 1, 1), self.config.fixed)
        if self.config.gate == "sample":
            gate = gate.mean((2, 3), keepdim=True)
        return gate.sigmoid()


def to_file(head: Head, dtype: torch.dtype = torch.float16) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata for a safetensors file. A ValueError if a weight is not finite in ``dtype``."""
    tensors = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in head.weights.items()}
    if bad := [name for name, weight in tensors.items() if not weight.isfinite().all()]:
        raise ValueError(
            f"{len(bad)} weights of the head are not finite (NaN or infinite), so nothing is saved: {shorten(bad)}; train it again"
        )
    facts = dataclasses.asdict(head.facts)
    details = {str(k): str(v) for k, v in facts.pop("details").items()}
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    known = {"format": FORMAT, "config": head.config.to_json(), "channels": str(head.config.channels)}
    return tensors, {**details, **metadata, **known}


def from_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Head:
    """The head of a file. A ValueError that describes the fault if the file is invalid or damaged."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"expected format {FORMAT!r} in the metadata, got {metadata.get('format')!r}: not a Cas-DM head"
        )
    if missing := [name for name in ("config", "latent_format", "prediction", "cfg") if not metadata.get(name)]:
        raise ValueError(f"its metadata lack {', '.join(missing)}")
    config = CasDMHeadConfig.from_json(metadata["config"])
    head = Head(config, dict(tensors), _facts(metadata))
    head.network()  # raises if a weight is missing, of the wrong shape, or not finite
    return head


def _facts(metadata: Mapping[str, str]) -> HeadFacts:
    known = {f.name for f in dataclasses.fields(HeadFacts)} - {"details"}
    others = {k: v for k, v in metadata.items() if k not in known | {"format", "config", "channels"}}
    try:
        facts = HeadFacts(
            latent_format=metadata["latent_format"],
            prediction=metadata["prediction"],
            cfg=float(metadata["cfg"]),
            steps=int(metadata.get("steps", "0")),
            data=metadata.get("data", ""),
            gate=tuple((float(percent), float(r)) for percent, r in json.loads(metadata.get("gate", "[]"))),
            details=others,
        )
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"its metadata cannot be read ({str(error)[:200]})") from error
    if facts.steps < 0 or not all(map(math.isfinite, itertools.chain([facts.cfg], *facts.gate))):
        raise ValueError(
            "its metadata have invalid values: expected a finite cfg, steps of at least 0 and a finite gate, got cfg"
            f" {facts.cfg:g}, steps {facts.steps} and gate {str(facts.gate)[:80]}"
        )
    return facts
