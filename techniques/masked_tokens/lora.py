"""Low-rank changes to the linear layers of a network: their values, their files, and the layers that train them.

LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685): y = W x + (alpha / rank) B A x, with W frozen.
The files are those of diffusers and peft: ``transformer.<module>.lora_A.weight`` [rank, in] and ``.lora_B.weight``
[out, rank]. Published ones lack alpha, which diffusers before 0.34 never wrote; ours carry it in their metadata, where
later diffusers read it.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.weights import complaint, shorten

TARGETS = ("to_q", "to_k", "to_v")  # what aMUSEd's scripts train
ADAPTER = "lora_adapter_metadata"  # diffusers' entry in a file's metadata, in JSON
# peft's names, those with an adapter's, and the older ones of diffusers and of kohya
KEY = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.)?(?P<module>.+)\.(?:"
    r"(?P<down>lora_A|lora_A\.default|lora\.down|lora_down)\.weight|"
    r"(?P<up>lora_B|lora_B\.default|lora\.up|lora_up)\.weight|alpha)"
)
TEXT_ENCODER = ("text_encoder.", "lora_te_", "lora_te1_")


class LoraWeights(NamedTuple):
    """The change of one layer's weight: (alpha / rank) up @ down."""

    down: Tensor  # A [rank, in]
    up: Tensor  # B [out, rank]
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA by the names of its modules, in float32 on the CPU: what the MASKED_TOKEN_LORA socket carries."""

    weights: Mapping[str, LoraWeights]
    facts: Mapping[str, str] = field(default_factory=dict)  # how it was made, for people; saved with it

    @property
    def steps(self) -> int:
        """Training steps behind it, 0 where unknown."""
        steps = self.facts.get("steps", "")
        return int(steps) if steps.isdecimal() and len(steps) < 20 else 0

    def ranks(self) -> list[int]:
        return sorted({pair.rank for pair in self.weights.values()})

    def alphas(self) -> list[float]:
        return sorted({pair.alpha for pair in self.weights.values()})

    def with_alpha(self, alpha: float) -> "Lora":
        """With ``alpha`` in every module; 0 keeps each one's own."""
        if alpha < 0 or not math.isfinite(alpha):
            raise ValueError(f"alpha {alpha:g} is not a positive number; use 0 for the LoRA's own")
        if alpha == 0:
            return self
        return Lora({name: pair._replace(alpha=alpha) for name, pair in self.weights.items()}, self.facts)


def to_file(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file in diffusers' layout."""
    tensors = {}
    for name, pair in lora.weights.items():
        tensors[f"transformer.{name}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = pair.up.contiguous()
    metadata = {**lora.facts, "format": "pt"}
    ranks, alphas = lora.ranks(), lora.alphas()
    if len(ranks) == len(alphas) == 1:
        adapter = {"r": ranks[0], "lora_alpha": alphas[0], "target_modules": sorted(lora.weights)}
        metadata[ADAPTER] = json.dumps({f"transformer.{key}": value for key, value in adapter.items()})
        return tensors, metadata | {"rank": str(ranks[0]), "alpha": repr(alphas[0])}
    # one number cannot say it: as kohya's files do
    return tensors | {f"transformer.{n}.alpha": torch.tensor(p.alpha) for n, p in lora.weights.items()}, metadata


def from_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> tuple[Lora, list[str]]:
    """The LoRA of a file, and the keys in it that change the text encoder, which a Lora does not hold.

    Where neither the metadata nor an ``.alpha`` key tells a module's alpha, it is the rank, scale 1, as diffusers loads.
    """
    metadata = dict(metadata or {})
    text = [key for key in tensors if key.startswith(TEXT_ENCODER)]
    parts, unknown = _parts(key for key in tensors if not key.startswith(TEXT_ENCODER))
    halves = [name for name, keys in parts.items() if not {"down", "up"} <= keys.keys()]
    if unknown or halves or not parts:
        raise ValueError(_not_a_lora(unknown, halves, text))
    default = _stored_alpha(metadata)
    weights = {}
    for name, keys in parts.items():
        alpha = _number(tensors[keys["alpha"]]) if "alpha" in keys else default
        weights[name] = _weights(name, tensors[keys["down"]], tensors[keys["up"]], alpha)
    facts = {key: value for key, value in metadata.items() if key not in ("format", "rank", "alpha", ADAPTER)}
    return Lora(weights, facts), text


def _parts(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Per module its keys as down, up and alpha; and the keys that are none of a LoRA."""
    parts, unknown = {}, []
    for key in keys:
        if match := KEY.fullmatch(key):
            kind = "down" if match["down"] else "up" if match["up"] else "alpha"
            parts.setdefault(match["module"], {})[kind] = key
        else:
            unknown.append(key)
    return parts, unknown


def _not_a_lora(unknown: list[str], halves: list[str], text: list[str]) -> str:
    if unknown:
        return (
            f"{len(unknown)} keys are not those of a LoRA: {shorten(unknown)}; use a file with <module>.lora_A.weight"
            " and <module>.lora_B.weight, as diffusers writes it"
        )
    if halves:
        return f"{len(halves)} modules have only one of lora_A and lora_B: {shorten(halves)}; the file is incomplete"
    if text:
        return f"all {len(text)} keys are of the text encoder: load the file with Load LoRA on the CLIP instead"
    return "the file has no weights; use one that Save Masked Token LoRA or diffusers wrote"


def _stored_alpha(metadata: Mapping[str, str]) -> float | None:
    """Alpha for all modules, from the metadata of diffusers or our own."""
    adapter = _adapter(metadata)
    adapter = {key.removeprefix("transformer."): value for key, value in adapter.items()}
    kinds = [key for key in ("use_rslora", "use_dora", "alpha_pattern") if adapter.get(key)]
    if kinds:
        raise ValueError(f"the LoRA was trained with {', '.join(kinds)}, which is not supported; train a plain LoRA")
    if adapter.get("lora_alpha"):
        return _number(adapter["lora_alpha"])
    return _number(metadata["alpha"]) if "alpha" in metadata else None


def _adapter(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(ADAPTER, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {ADAPTER} is no JSON ({error}); the file is damaged") from error
    if not isinstance(found, dict):
        raise ValueError(f"its {ADAPTER} is no object but {found!r:.80}; the file is damaged")
    return found


def _number(alpha: Any) -> float:
    """An alpha that a file tells, as text, number or tensor; a ValueError for what is no finite number."""
    try:
        found = float(alpha)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"its alpha {alpha!r:.80} is no finite number; the file is damaged, take another")
    return found


def _weights(name: str, down: Tensor, up: Tensor, alpha: float | None) -> LoraWeights:
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"{name} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}, which are not [rank, in] and"
            " [out, rank] of one rank; only LoRAs of linear layers are supported"
        )
    for key, tensor in (("lora_A", down), ("lora_B", up)):
        if wrong := complaint(tensor, tensor.shape):
            raise ValueError(f"{name}.{key}: {wrong}; the file is damaged or its training failed")
    return LoraWeights(down.float(), up.float(), float(len(down)) if alpha is None else alpha)


def check_fits(lora: Lora, shapes: Mapping[str, torch.Size]) -> None:
    """Raise a ValueError that lists what of ``lora`` a network with these weights, by name, has no layer for."""
    missing, wrong = [], []
    for name, pair in lora.weights.items():
        change, shape = (pair.up.shape[0], pair.down.shape[1]), shapes.get(f"{name}.weight")
        if shape is None:
            missing.append(name)
        elif tuple(shape) != change:
            wrong.append(f"{name}: the LoRA is for {change}, the model has {tuple(shape)}")
    if missing or wrong:
        parts = [f"{len(missing)} modules that the model lacks: {shorten(missing)}"] if missing else []
        parts += [f"{len(wrong)} of another size: {shorten(wrong)}"] if wrong else []
        raise ValueError(f"the LoRA does not fit this model: {'; '.join(parts)}; use the model that it was trained on")


class LoraLinear(nn.Module):
    """A frozen linear layer and its trained change, which computes in float32 whatever the layer does."""

    def __init__(self, linear: nn.Module, weights: LoraWeights) -> None:
        super().__init__()
        device = next(linear.parameters()).device
        self.linear = linear
        # copies: what a run starts from is not what it trains
        self.down = nn.Parameter(weights.down.to(device, torch.float32, copy=True))
        self.up = nn.Parameter(weights.up.to(device, torch.float32, copy=True))
        self.alpha = weights.alpha

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)
        return self.linear(x) + ((self.alpha / len(self.down)) * change).to(x.dtype)

    def weights(self) -> LoraWeights:
        """A copy of what has been learned so far, on the CPU."""
        return LoraWeights(self.down.detach().cpu().clone(), self.up.detach().cpu().clone(), self.alpha)


def target_modules(network: nn.Module, targets: Iterable[str] = TARGETS) -> list[str]:
    """The linear layers of ``network`` whose name ends in one of ``targets``."""
    targets = tuple(targets)
    found = [
        name
        for name, module in network.named_modules()
        if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear)
    ]
    if not found:
        raise ValueError(f"the model has no layer named {', '.join(targets)}; use a masked token transformer")
    return found


def fresh(network: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> Lora:
    """A LoRA that changes nothing yet: A as peft draws it, uniform in ±1/√in, B zero."""
    weights = {}
    for name in target_modules(network):
        out, width = network.get_parameter(f"{name}.weight").shape
        if rank > min(out, width):
            raise ValueError(f"rank {rank} is more than {name} has, {min(out, width)}; use a smaller rank")
        down = (2 * torch.rand(rank, width, generator=generator) - 1) / math.sqrt(width)
        weights[name] = LoraWeights(down, torch.zeros(out, rank), alpha)
    return Lora(weights)


def check_resume(lora: Lora, network: nn.Module, rank: int, alpha: float) -> None:
    """Raise a ValueError where the LoRA to go on with is not of these settings."""
    check_fits(lora, {name: weight.shape for name, weight in network.state_dict().items()})
    for name, asked, stored in (("rank", rank, lora.ranks()), ("alpha", alpha, lora.alphas())):
        if stored != [asked]:
            seen = ", ".join(f"{value:g}" for value in stored)
            raise ValueError(
                f"the LoRA to resume has {name} {seen}, this node asks for {asked:g}; set {name} to {stored[0]:g},"
                " or leave 'lora' unwired to start anew"
            )
    modules, targets = set(lora.weights), set(target_modules(network))
    if modules != targets:
        differ = sorted(modules ^ targets)
        raise ValueError(
            f"the LoRA to resume trains other modules than {', '.join(TARGETS)}: {len(differ)} differ, {shorten(differ)};"
            " merge it with Load Masked Token LoRA before training, and leave 'lora' unwired"
        )


def attach(network: nn.Module, lora: Lora) -> dict[str, LoraLinear]:
    """Put ``lora`` on the layers of ``network``, in place, ready to train; everything else is frozen."""
    network.requires_grad_(False)
    layers = {}
    for name, weights in lora.weights.items():
        parent, _, leaf = name.rpartition(".")
        layers[name] = LoraLinear(network.get_submodule(name), weights)
        setattr(network.get_submodule(parent), leaf, layers[name])
    return layers


def learned(layers: Mapping[str, LoraLinear], facts: Mapping[str, Any]) -> Lora:
    """What the attached ``layers`` have learned so far."""
    weights = {name: layer.weights() for name, layer in layers.items()}
    return Lora(weights, {key: str(value) for key, value in facts.items()})
