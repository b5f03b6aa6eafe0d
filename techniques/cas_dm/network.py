"""The second module φ of a cascade: a small U-Net that repaints a frozen model's x0, and says where to trust it.

Cas-DM (arXiv 2401.02414), a reconstruction: there is no public code of the paper, and it leaves open what φ sees and
how the gate is made. Here φ sees x̂_θ and the noise level, by a switch also x_t, and

    x_φ = x̂_θ + n / √(s² + n²) · F(x̂_θ, level)         r = σ(G(x̂_θ, level))

with F and G the last layer of one U-Net and s, n the amplitudes of signal and noise in x_t: where there is no noise, x̂_θ
is the picture and nothing is left to repaint. The last layer begins at zero, so that a new head has x_φ = x̂_θ.

The noise level is ln(n / s), the half of the negative log-SNR. It is the same for eps, v and flow models where their
pictures are equally noisy, whatever their sigmas and shifts.

With the default widths, for latents of 4 channels: 0.96 million weights (1.9 MB in float16) and 2.3 GFLOP at 64x64, where
one prediction of SD 1.5 takes 803, and two are made for a guided step (counted by torch; 2 per multiplication and addition).

Shapes: B samples, C channels of the latent, h and w positions of any number.
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
from ...common.weights import PACKED, load, shorten

FORMAT = "chorus-cas-dm-1"  # in the metadata of a file
GATES = ("pixel", "channel", "sample", "fixed")
GROUPS = 8  # of the normalisation; widths are multiples of it
FREQUENCIES = 16  # of the embedded noise level
MAX_LEVELS = 6
MOST = 2**16  # channels of any layer


@dataclass(frozen=True, kw_only=True)
class CasDMHeadConfig:
    """Sizes and choices. ``gate``: one r per pixel, per pixel and channel, per sample, or the number ``fixed``."""

    channels: int
    widths: tuple[int, ...] = (64, 64, 96)  # one per resolution, each half of the one before
    embedding: int = 128  # of the noise level
    condition_on_x_t: bool = False  # x_t beside x̂_θ, scaled to unit variance
    gate: str = "pixel"
    fixed: float = 0.5

    def __post_init__(self) -> None:
        if not (1 <= self.channels <= MOST and 1 <= self.embedding <= MOST):
            raise ValueError(
                f"channels {self.channels} and embedding {self.embedding} must be at least 1, at most {MOST}"
            )
        if not 1 <= len(self.widths) <= MAX_LEVELS or any(w % GROUPS or not GROUPS <= w <= MOST for w in self.widths):
            raise ValueError(f"widths {self.widths} are not 1 to {MAX_LEVELS} multiples of {GROUPS} up to {MOST}")
        if self.gate not in GATES:
            raise ValueError(f"gate '{self.gate}' is unknown; use one of {', '.join(GATES)}")
        if not 0.0 <= self.fixed <= 1.0:
            raise ValueError(f"a fixed gate of {self.fixed} is not in 0 to 1")

    @property
    def gates(self) -> int:
        """Channels of the last layer that become r."""
        return {"pixel": 1, "channel": self.channels, "sample": 1, "fixed": 0}[self.gate]

    @classmethod
    def from_json(cls, text: str) -> "CasDMHeadConfig":
        """The config of a file; a ValueError for anything else than ``to_json`` gives."""
        try:
            values, names = json.loads(text), {f.name for f in dataclasses.fields(cls)}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its config is no JSON ({error}): {text[:80]}") from error
        if isinstance(values, dict) and "sees_x" in values:  # its name in files of before the first release
            values["condition_on_x_t"] = values.pop("sees_x")
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"its config is {text[:80]}, which does not have just {', '.join(sorted(names))}")
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        wrong = [name for name, kind in kinds.items() if not _is_a(kind, values[name])]
        if wrong:
            raise ValueError(f"its config has no valid {', '.join(wrong)}: {text[:200]}")
        values["widths"] = tuple(values["widths"])
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def _is_a(kind: Any, value: Any) -> bool:
    if kind == tuple[int, ...]:
        return isinstance(value, list) and all(type(v) is int for v in value)
    return type(value) in ((int, float) if kind is float else (kind,))


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """What a head was trained for and on; what it can be used with hangs on the first three."""

    latent_format: str  # of the host, by its class name
    prediction: str  # of theta: eps, v, flow, ...
    cfg: float  # the guidance scale of the x̂_θ that it has seen
    steps: int = 0
    data: str = ""
    gate: tuple[tuple[float, float], ...] = ()  # (sampling percent from 0 to 1, mean r there)
    details: Mapping[str, str] = field(default_factory=dict)  # what else shall be kept: losses, metric, host, ...


@dataclass(frozen=True, eq=False)
class Head:
    """A head as a value: what a CAS_DM_HEAD socket carries, what training returns and goes on from."""

    config: CasDMHeadConfig
    weights: Mapping[str, Tensor]  # on the CPU; never changed
    facts: HeadFacts

    def network(self, operations: Operations = nn) -> "CasDMHeadNet":
        """φ with these weights in float32: frozen, in memory of its own. A ValueError where they do not fit.

        ``operations``: the layers to build it of; the host's casting ones let the host move it.
        """
        weights = {name: _wide(w) for name, w in self.weights.items()}
        return load(CasDMHeadNet, self.config, weights, operations)


def _wide(weight: Any) -> Any:
    floating = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype != PACKED
    return weight.to(torch.float32, copy=True) if floating else weight


def new_head(config: CasDMHeadConfig, facts: HeadFacts, generator: torch.Generator) -> Head:
    """An untrained head: x_φ is x̂_θ, r one half (or the fixed number)."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in CasDMHeadNet(config).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if name.startswith("last.") or ".conv2." in name or name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        elif len(shape) == 1:  # gains
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
    """ln(n / s) [B] -> [B, embedding]."""

    def __init__(self, size: int, operations: Operations) -> None:
        super().__init__()
        self.linear1 = operations.Linear(2 * FREQUENCIES, size)
        self.linear2 = operations.Linear(size, size)

    def forward(self, level: Tensor) -> Tensor:
        # from a quarter of a wave over all levels that occur to one over neighbouring steps of a long schedule
        exponents = torch.linspace(-3.0, 3.0, FREQUENCIES, dtype=torch.float32, device=level.device)
        angles = level.float()[:, None] * torch.exp(exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(level.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(waves))))


class CasDMHeadNet(nn.Module):
    """φ. Computes in the dtype of its input; of any height and width, since sides are halved upwards and restored."""

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
        """x_φ [B, C, h, w] and r, which broadcasts to it.

        x0     [B, C, h, w]: x̂_θ in the scale in which the model works
        level  [B]: ln(n / s), finite
        x      [B, C, h, w]: x_t / √(s² + n²); seen only by heads with ``condition_on_x_t``, and needed by those
        """
        if x0.ndim != 4 or x0.shape[1] != self.config.channels:
            raise ValueError(f"the head repaints [B, {self.config.channels}, h, w], not {tuple(x0.shape)}")
        seen = x0
        if self.config.condition_on_x_t:
            if x is None:
                raise ValueError("this head sees x_t beside x0; give it both")
            seen = torch.cat([x0, x.to(x0)], dim=1)
        level = level.to(x0.dtype)
        embedding = self.embed(level)
        h = self.first(seen)

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
    """Tensors and metadata of a safetensors file. A ValueError where a weight is not finite, as after a failed training."""
    tensors = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in head.weights.items()}
    if bad := [name for name, weight in tensors.items() if not weight.isfinite().all()]:
        raise ValueError(
            f"{len(bad)} weights of the head are not finite (NaN or infinite): {shorten(bad)}; train it anew"
        )
    facts = dataclasses.asdict(head.facts)
    details = {str(k): str(v) for k, v in facts.pop("details").items()}
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    known = {"format": FORMAT, "config": head.config.to_json(), "channels": str(head.config.channels)}
    return tensors, {**details, **metadata, **known}


def from_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Head:
    """The head of a file; a ValueError that says what is wrong with anything that is none, whole and sound."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its metadata say format {metadata.get('format')!r}, not {FORMAT!r}: it is no Cas-DM head")
    if missing := [name for name in ("config", "latent_format", "prediction", "cfg") if not metadata.get(name)]:
        raise ValueError(f"its metadata lack {', '.join(missing)}")
    config = CasDMHeadConfig.from_json(metadata["config"])
    head = Head(config, dict(tensors), _facts(metadata))
    head.network()  # raises where a weight is missing, of another shape, or no number
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
            f"its metadata tell of cfg {facts.cfg:g}, {facts.steps} steps and a gate that no training gives"
        )
    return facts
