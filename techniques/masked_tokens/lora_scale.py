"""The scale of a LoRA as its trainer defines it: alpha keys, metadata of a safetensors file, PEFT's adapter_config.json.

PEFT and diffusers scale by alpha / rank, or by alpha / sqrt(rank) with rank-stabilised LoRA (arXiv 2312.03732). kohya's
programs scale by alpha / rank with alpha from the file's ``.alpha`` keys, and by 1 without them. In this module the scale
is always alpha / rank: the alpha of a rank-stabilised LoRA is multiplied by sqrt(rank) when it is read.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ...common.weights import shorten

ADAPTER = "lora_adapter_metadata"  # diffusers' metadata entry, in JSON
OWN = "alpha"  # this pack's metadata entry
KOHYA = "ss_network_alpha"  # kohya's programs write it for information and read only the .alpha keys
CONFIG = "adapter_config.json"  # PEFT's file of settings beside the weights
PEFT_ALPHA = 8.0  # PEFT's alpha if its configuration has none
PEFT_SETTINGS = ("lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "init_lora_weights", "r")
# PEFT's settings with which a file is no plain LoRA, if they are set
UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "layer_replication")
UNSUPPORTED += ("target_parameters", "trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config")
UNSUPPORTED += ("use_bdlora",)
# initialisations that also change the weights of the base model
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
SCALE_WORD = re.compile(
    r"(?:^|[^a-z])(?:alphas?|scale|scaling|strength|multiplier|use_rslora|use_dora)(?:$|[^a-z])", re.I
)
# settings of training whose names have such a word
TRAINING = ("ss_scale_", "ss_loss_", "ss_guidance_scale", "guidance_scale", "modelspec.")
# PEFT's alpha_pattern may contain any regular expression, and some of them take forever; only names are supported
PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.){1,500}\$?")
LARGEST_ALPHA = 1e30  # scales stay within the range of float32
SAME = 1e-6  # relative difference up to which two alphas are equal
TEXT_ENCODERS = {"text_encoder", "text_encoder_2"}  # for them, the node has a warning of its own


class Source(NamedTuple):
    """A place in a file that defines alpha."""

    name: str
    alpha: Callable[[str, int], float | None]  # of a module with its rank; None if the source does not define it


class Scales:
    """The alphas of the modules of one file, from the first source that defines each of them."""

    def __init__(
        self, keys: Mapping[str, Any], metadata: Mapping[str, str], config: Mapping[str, Any] | None = None
    ) -> None:
        """``keys``: the values of the ``.alpha`` keys by module. ``config``: the content of adapter_config.json."""
        self.keys, self.metadata, self.config = keys, metadata, config
        adapter, self.components = _adapter(metadata)
        self.sources = [Source("the .alpha key", lambda name, rank: number(keys[name]) if name in keys else None)]
        if adapter:
            self.sources.append(peft(f"the metadata {ADAPTER}", adapter))
        if "lora_alpha" in metadata:
            settings = {key: _plain(metadata[key]) for key in PEFT_SETTINGS if key in metadata}
            self.sources.append(peft("the metadata lora_alpha", settings))
        if OWN in metadata:
            own = number(metadata[OWN])
            self.sources.append(Source(f"the metadata {OWN}", lambda name, rank: own))
        if config is not None:
            self.sources.append(self._beside(config))
        self.used: set[float] = set()
        self.unused: dict[str, str] = {}  # the reason, by source

    def _beside(self, config: Mapping[str, Any]) -> Source:
        """The alphas of adapter_config.json, unless its rank shows that it belongs to another file."""
        source = peft(CONFIG, config)
        expected = config.get("r") if not config.get("rank_pattern") else None

        def alpha(name: str, rank: int) -> float | None:
            if expected is not None and expected != rank:
                self.unused[CONFIG] = f"it is for rank {expected!r:.40}, but {name[:80]} has rank {rank}"
                return None
            return source.alpha(name, rank)

        return Source(CONFIG, alpha)

    def alpha(self, name: str, rank: int) -> float:
        """The alpha of a module. If no source defines one, it is the rank of the module, so that the scale is 1."""
        given = [(source.name, alpha) for source in self.sources if (alpha := source.alpha(name, rank)) is not None]
        first, alpha = given[0] if given else ("", float(rank))
        for other, value in given[1:]:
            if not math.isclose(value, alpha, rel_tol=SAME):
                self.unused[other] = (
                    f"its alpha for {name[:80]} is {value:g}, but {first} takes priority with {alpha:g}; to use {value:g},"
                    " enter it as alpha of this node"
                )
        self.used.add(alpha)
        return alpha

    def warnings(self) -> list[str]:
        """Warnings about values in the file that define a scale, or may define one, and are not used.

        Call it after ``alpha`` was called for all modules.
        """
        texts = [f"{source} is not used: {why}" for source, why in self.unused.items()]
        if self.components:
            texts.append(f"the metadata {ADAPTER} of {shorten(self.components)} is not used: it is not the transformer")
        for key, text in self.metadata.items():
            if key == KOHYA and not self._is_used(text):
                why = (
                    f"kohya's programs read only the .alpha keys, which {'differ' if self.keys else 'are missing'}; to"
                    " use it, enter that value as alpha of this node"
                )
            elif key != KOHYA and self._is_unknown(key):
                why = "its meaning is not known; if the effect is too weak or too strong, change alpha of this node"
            else:
                continue
            texts.append(f"the metadata {key[:80]} {text[:40]} is not used: {why}")
        return texts

    def _is_used(self, text: str) -> bool:
        try:
            return any(math.isclose(float(text), alpha, rel_tol=SAME) for alpha in self.used)
        except ValueError:
            return text in ("", "None")

    def _is_unknown(self, key: str) -> bool:
        if key in (ADAPTER, OWN) or (key in PEFT_SETTINGS and "lora_alpha" in self.metadata):
            return False
        return names_scale(key) and bool(_plain(self.metadata[key]))


def names_scale(key: str) -> bool:
    """Whether the name of a metadata entry contains a word for a scale, and is not that of a training setting."""
    return SCALE_WORD.search(key) is not None and not key.startswith(TRAINING)


def peft(source: str, settings: Mapping[str, Any]) -> Source:
    """The alphas that the settings of PEFT's LoraConfig define. A ValueError if it is not a plain LoRA."""
    kinds = [f"{key} {settings[key]!r:.40}" for key in UNSUPPORTED if settings.get(key)]
    if (kind := settings.get("peft_type") or "LORA") not in ("LORA", "PeftType.LORA"):
        kinds.append(f"peft_type {kind!r:.40}")
    if (start := settings.get("init_lora_weights")) and str(start).lower().startswith(CHANGES_BASE):
        kinds.append(f"init_lora_weights {start!r:.40}, which also changes the base model")
    if kinds:
        raise ValueError(
            f"the LoRA was trained with {', '.join(kinds)} ({source}), which is not supported; train a plain LoRA, or"
            " merge it into the transformer with PEFT's merge_and_unload and load that with Load Masked Token Model"
        )
    given = settings.get("lora_alpha")
    default = PEFT_ALPHA if given is None else number(given)
    stabilised = bool(settings.get("use_rslora"))
    patterns = _patterns(source, settings.get("alpha_pattern") or {})

    def alpha(name: str, rank: int) -> float:
        value = next((value for pattern, value in patterns if pattern.fullmatch(name)), default)
        # the scale value / sqrt(rank), written as alpha / rank
        return value * math.sqrt(rank) if stabilised else value

    return Source(source, alpha)


def _patterns(source: str, given: Any) -> list[tuple[re.Pattern[str], float]]:
    """Pairs of a pattern and its alpha; a pattern matches whole names of modules.

    As in PEFT, a key that begins with "^" is the whole name, and any other key is the last part or parts of it.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"alpha_pattern in {source}: expected an object, got {given!r:.80}; the file is damaged")
    wrong = [key for key in given if not PATTERN.fullmatch(key)]
    if wrong:
        raise ValueError(
            f"alpha_pattern in {source} has {wrong[0]!r:.80}, which is not supported; use names of modules instead"
        )
    return [
        (re.compile(key.strip("^$") if key.startswith("^") else rf"(?:.*\.)?{key.rstrip('$')}"), number(value))
        for key, value in given.items()
    ]


def _adapter(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of the transformer in diffusers' metadata, and the other components that it has settings for."""
    try:
        adapter = json.loads(metadata.get(ADAPTER, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"its metadata {ADAPTER} is not valid JSON ({error}); the file is damaged, use another"
        ) from error
    if not isinstance(adapter, dict):
        raise ValueError(
            f"its metadata {ADAPTER}: expected an object, got {adapter!r:.80}; the file is damaged, use another"
        )
    settings = {key.removeprefix("transformer."): value for key, value in adapter.items()}
    components = sorted({key.partition(".")[0] for key in settings if "." in key} - TEXT_ENCODERS)
    return {key: value for key, value in settings.items() if "." not in key}, components


def _plain(text: str) -> Any:
    """The value of a metadata text: JSON, or a word of Python."""
    words = {"True": True, "False": False, "None": None}
    try:
        return words[text] if text in words else json.loads(text)
    except (ValueError, RecursionError):
        return text


def number(alpha: Any) -> float:
    """An alpha from a file (text, number or tensor) as a float; a ValueError for anything but a number up to LARGEST_ALPHA."""
    try:
        value = float(alpha)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = math.nan
    if not abs(value) <= LARGEST_ALPHA:
        raise ValueError(
            f"its alpha {alpha!r:.80} is not a number up to {LARGEST_ALPHA:g}; the file is damaged, use another"
        )
    return value
