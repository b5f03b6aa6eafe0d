"""LoRAs of the linear layers of a network: weights, files and trainable layers.

LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685): y = W x + (alpha / rank) B A x, with W frozen.
Files have the layout of diffusers and peft: ``transformer.<module>.lora_A.weight`` [rank, in] and ``.lora_B.weight``
[out, rank]. diffusers before 0.34 did not write alpha, so published files lack it. Files written here have alpha in the
metadata, where later versions of diffusers read it.
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

from ...common.weights import shorten, weight_error
from .lora_scale import ADAPTER, PEFT_SETTINGS, Scales, names_scale

TARGETS = ("to_q", "to_k", "to_v")  # as in aMUSEd's training script
# key names of peft, of peft with the name of an adapter, of older diffusers and of kohya
KEY = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.)?(?P<module>.+)\.(?:"
    r"(?P<down>lora_A|lora_A\.default|lora\.down|lora_down)\.weight|"
    r"(?P<up>lora_B|lora_B\.default|lora\.up|lora_up)\.weight|alpha)"
)
# files of other methods, by the keys that only they have
OTHER_KINDS = {
    "a DoRA": re.compile(r"lora_magnitude_vector|dora_scale|\.magnitude"),
    "a LoHa": re.compile(r"\.hada_"),
    "a LoKr": re.compile(r"\.lokr_"),
    "a LoRA of convolutions with a middle layer": re.compile(r"\.lora_mid"),
    "a LoRA with biases": re.compile(r"\.lora_(?:A|B|down|up)\.(?:\w+\.)?bias$"),
    "a LoRA with further scales (scalar, rescale)": re.compile(r"\.(?:scalar|rescale)$"),
    "a LoRA of embeddings": re.compile(r"\.lora_embedding_"),
    "an OFT or BOFT": re.compile(r"\.b?oft_"),
    "a GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "an IA3": re.compile(r"\.ia3_l|\.on_input$"),
    "a VeRA": re.compile(r"\bvera_"),
    "a set of whole weights or differences": re.compile(r"\.(?:diff|diff_b|set_weight|w_norm|b_norm|reshape_weight)$"),
}
SCALES = ("format", "rank", ADAPTER, *PEFT_SETTINGS)  # not in ``facts``: used for alpha
TEXT_ENCODER = ("text_encoder.", "lora_te_", "lora_te1_")


class LoraWeights(NamedTuple):
    """The LoRA of one layer, which adds (alpha / rank) up @ down to the weight."""

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
    """LoRA weights by module name, in float32 on the CPU: the value of MASKED_TOKEN_LORA sockets."""

    weights: Mapping[str, LoraWeights]
    facts: Mapping[str, str] = field(default_factory=dict)  # training settings for information; saved in the metadata

    @property
    def steps(self) -> int:
        """The number of training steps; 0 if unknown."""
        steps = self.facts.get("steps", "")
        return int(steps) if steps.isdecimal() and len(steps) < 20 else 0

    def ranks(self) -> list[int]:
        return sorted({pair.rank for pair in self.weights.values()})

    def alphas(self) -> list[float]:
        return sorted({pair.alpha for pair in self.weights.values()})

    def with_alpha(self, alpha: float) -> "Lora":
        """The LoRA with ``alpha`` in every module; 0 keeps the stored values."""
        if alpha < 0 or not math.isfinite(alpha):
            raise ValueError(f"alpha {alpha:g} is not a finite number of at least 0; use 0 for the LoRA's stored alpha")
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
    # ranks or alphas that differ between modules need one alpha key per module, as in kohya's files
    return tensors | {f"transformer.{n}.alpha": torch.tensor(p.alpha) for n, p in lora.weights.items()}, metadata


class LoraFile(NamedTuple):
    """The content of a LoRA file."""

    lora: Lora
    text_encoder_keys: list[str]  # which the LoRA does not include
    warnings: list[str]  # everything in the file that names a scale and is not used


def from_file(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> LoraFile:
    """The LoRA of a file. ``config``: the content of PEFT's adapter_config.json, if the file comes with one.

    Alpha comes from the .alpha keys, the metadata and ``config`` (module lora_scale). If nothing specifies it, a module's alpha is its rank (scale 1), as in diffusers.
    """
    metadata = dict(metadata or {})
    text = [key for key in tensors if key.startswith(TEXT_ENCODER)]
    parts, unknown = _parts(key for key in tensors if not key.startswith(TEXT_ENCODER))
    halves = [name for name, keys in parts.items() if not {"down", "up"} <= keys.keys()]
    if unknown or halves or not parts:
        raise ValueError(_not_a_lora(unknown, halves, text))
    alphas = {name: tensors[keys["alpha"]] for name, keys in parts.items() if "alpha" in keys}
    scales = Scales(alphas, metadata, config)
    weights = {name: _weights(name, tensors[keys["down"]], tensors[keys["up"]], scales) for name, keys in parts.items()}
    facts = {key: value for key, value in metadata.items() if key not in SCALES and not names_scale(key)}
    return LoraFile(Lora(weights, facts), text, scales.warnings())


def _parts(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The down, up and alpha keys of every module, and the keys that do not belong to a LoRA."""
    parts, unknown = {}, []
    for key in keys:
        if match := KEY.fullmatch(key):
            kind = "down" if match["down"] else "up" if match["up"] else "alpha"
            first = parts.setdefault(match["module"], {}).setdefault(kind, key)
            if first != key:
                raise ValueError(
                    f"the keys {first[:120]} and {key[:120]} are for one module; use a file with one LoRA per module"
                )
        else:
            unknown.append(key)
    return parts, unknown


def _not_a_lora(unknown: list[str], halves: list[str], text: list[str]) -> str:
    if unknown:
        kinds = [kind for kind, pattern in OTHER_KINDS.items() if any(map(pattern.search, unknown))]
        remedy = (
            f"the file is {' and '.join(kinds)}. Train a plain LoRA, or merge the file into the transformer with the"
            " program that trained it, and load the merged model with Load Masked Token Model"
            if kinds
            else "use a file with <module>.lora_A.weight and <module>.lora_B.weight, as diffusers writes it"
        )
        return f"{len(unknown)} keys are not those of a LoRA: {shorten(unknown)}; {remedy}"
    if halves:
        return f"{len(halves)} modules have only one of lora_A and lora_B: {shorten(halves)}; the file is incomplete, use another"
    if text:
        return f"all {len(text)} keys are for the text encoder; load the file with Load LoRA on the CLIP instead"
    return "the file has no weights; use one that Save Masked Token LoRA or diffusers wrote"


def _weights(name: str, down: Tensor, up: Tensor, scales: Scales) -> LoraWeights:
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"{name} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}, expected [rank, in] and"
            " [out, rank] of the same rank; only LoRAs of linear layers are supported, use another"
        )
    for key, tensor in (("lora_A", down), ("lora_B", up)):
        if wrong := weight_error(tensor, tensor.shape):
            raise ValueError(f"{name}.{key}: {wrong}; the file is damaged or its training failed, use another")
    return LoraWeights(down.float(), up.float(), scales.alpha(name, len(down)))


def check_fits(lora: Lora, shapes: Mapping[str, torch.Size]) -> None:
    """Raise a ValueError that lists the modules of ``lora`` that do not fit a network.

    ``shapes``: the shapes of the network's weights, by name.
    """
    missing, wrong = [], []
    for name, pair in lora.weights.items():
        size, shape = (pair.up.shape[0], pair.down.shape[1]), shapes.get(f"{name}.weight")
        if shape is None:
            missing.append(name)
        elif tuple(shape) != size:
            wrong.append(f"{name}: the LoRA is for {size}, the model has {tuple(shape)}")
    if missing or wrong:
        parts = [f"{len(missing)} modules are not in the model: {shorten(missing)}"] if missing else []
        parts += [f"{len(wrong)} have another size: {shorten(wrong)}"] if wrong else []
        raise ValueError(f"the LoRA does not fit this model: {'; '.join(parts)}; use the model that it was trained on")


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable LoRA; the LoRA computes in float32 for any dtype of the layer."""

    def __init__(self, linear: nn.Module, weights: LoraWeights) -> None:
        super().__init__()
        device = next(linear.parameters()).device
        self.linear = linear
        # copies, so that training does not change the initial LoRA
        self.down = nn.Parameter(weights.down.to(device, torch.float32, copy=True))
        self.up = nn.Parameter(weights.up.to(device, torch.float32, copy=True))
        self.alpha = weights.alpha

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)
        return self.linear(x) + ((self.alpha / len(self.down)) * change).to(x.dtype)

    def weights(self) -> LoraWeights:
        """A copy of the current weights, on the CPU."""
        return LoraWeights(self.down.detach().cpu().clone(), self.up.detach().cpu().clone(), self.alpha)


def target_modules(network: nn.Module, targets: Iterable[str] = TARGETS) -> list[str]:
    """The linear layers of ``network`` whose name ends in one of ``targets``."""
    targets = tuple(targets)
    names = [
        name
        for name, module in network.named_modules()
        if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear)
    ]
    if not names:
        raise ValueError(f"the model has no layer named {', '.join(targets)}; use a masked token transformer")
    return names


def initial_lora(network: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> Lora:
    """An initial LoRA, which has no effect: B is zero. A is uniform between -1/√n and 1/√n for a layer of input width n, as in peft."""
    weights = {}
    for name in target_modules(network):
        out, width = network.get_parameter(f"{name}.weight").shape
        if rank > min(out, width):
            raise ValueError(
                f"rank {rank} is more than {min(out, width)}, the smaller side of {name}; use at most {min(out, width)}"
            )
        down = (2 * torch.rand(rank, width, generator=generator) - 1) / math.sqrt(width)
        weights[name] = LoraWeights(down, torch.zeros(out, rank), alpha)
    return Lora(weights)


def check_resume(lora: Lora, network: nn.Module, rank: int, alpha: float) -> None:
    """Raise a ValueError if the LoRA to resume does not fit ``network``, or differs in rank, alpha or modules."""
    check_fits(lora, {name: weight.shape for name, weight in network.state_dict().items()})
    for name, requested, stored in (("rank", rank, lora.ranks()), ("alpha", alpha, lora.alphas())):
        if stored != [requested]:
            values = ", ".join(f"{value:g}" for value in stored)
            raise ValueError(
                f"the LoRA to resume has {name} {values}, this node has {requested:g}; set {name} to {stored[0]:g},"
                " or disconnect 'lora' to train a new one"
            )
    modules, targets = set(lora.weights), set(target_modules(network))
    if modules != targets:
        differ = sorted(modules ^ targets)
        raise ValueError(
            f"the LoRA to resume has other modules than {', '.join(TARGETS)}: {len(differ)} differ, {shorten(differ)};"
            " load it on the model with Load Masked Token LoRA instead, and disconnect 'lora'"
        )


def attach(network: nn.Module, lora: Lora) -> dict[str, LoraLinear]:
    """Replace the layers of ``lora`` in ``network`` by trainable LoraLinear layers, in place; freeze everything else."""
    network.requires_grad_(False)
    layers = {}
    for name, weights in lora.weights.items():
        parent, _, leaf = name.rpartition(".")
        layers[name] = LoraLinear(network.get_submodule(name), weights)
        setattr(network.get_submodule(parent), leaf, layers[name])
    return layers


def current_lora(layers: Mapping[str, LoraLinear], facts: Mapping[str, Any]) -> Lora:
    """The current LoRA of the attached ``layers``; ``facts`` are stored as text."""
    weights = {name: layer.weights() for name, layer in layers.items()}
    return Lora(weights, {key: str(value) for key, value in facts.items()})
