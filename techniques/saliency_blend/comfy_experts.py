"""Experts of a blend: models evaluated in addition to the base, with their own patches, hooks and conditioning."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...host.attachments import Conditioning
from ...host.autograd_copies import clone_tensors
from ...host.injections import move_injections
from ...host.latent_spaces import LatentSpace
from ...host.module_copies import copy_module
from ...host.parametrization import Conversion, latent_format_of, sampling_of
from ...host.patcher_differences import same_module
from .experts import ExpertSettings
from .trace import BlendTrace

log = logging.getLogger("comfyui-chorus")


class Expert:
    """An expert as connected to its node: MODEL, conditioning, settings, trace, and a copy of the weights if needed.

    All clones of the blended MODEL share this object. ``copies``: copies of weights that were made before, for the
    same MODEL with other settings.
    """

    def __init__(
        self,
        patcher: ModelPatcher,
        positive: Conditioning | None,
        negative: Conditioning | None,
        settings: ExpertSettings,
        trace: BlendTrace | None = None,
        copies: "OwnCopies | None" = None,
    ) -> None:
        self.patcher, self.positive, self.negative = patcher, positive, negative
        self.settings, self.trace = settings, trace
        self._copies = copies or OwnCopies()

    @property
    def label(self) -> str:
        return self.settings.label

    def conditionings(self) -> list:
        return [entry for cond in (self.positive, self.negative) if cond is not None for entry in cond]

    def with_own_weights(self) -> ModelPatcher:
        """The expert's MODEL on a separate module, copied on the first call and kept as long as this object."""
        if self._copies.patcher is None:
            log.info(
                "'%s' uses the checkpoint of another model with other patches or hooks; its weights are copied",
                self.label,
            )
            self._copies.patcher = _copy_with_module(self.patcher)
        return self._copies.patcher

    def with_own_network(self, control: "Control") -> "Network":
        """A copy of the network of ``control``, made on the first call and kept as long as the network and this object."""
        found = self._copies.networks.get(control.control_model)
        if found is None:
            log.info("'%s' uses a %s of another model; its weights are copied", self.label, type(control).__name__)
            device = control.control_model_wrapped.load_device
            comfy.model_management.unload_model_and_clones(control.control_model_wrapped)
            own = control.deepclone_multigpu(device)
            found = self._copies.networks[control.control_model] = own.control_model, own.control_model_wrapped
        return found

    def with_settings(self, settings: ExpertSettings, trace: BlendTrace | None) -> "Expert":
        """This expert with other settings and another trace. Copies of its weights are shared with this object."""
        return Expert(self.patcher, self.positive, self.negative, settings, trace, self._copies)

    def for_gradients(self, copy: Callable[[ModelPatcher], ModelPatcher]) -> "Expert":
        """A copy of this expert that records no trace, with a MODEL whose weights autograd can save."""
        return Expert(copy(self.patcher), clone_tensors(self.positive), clone_tensors(self.negative), self.settings)


class OwnCopies:
    """Copies of the weights of an expert and of its ControlNets, made when they are first needed."""

    def __init__(self) -> None:
        self.patcher: ModelPatcher | None = None
        self.networks: WeakKeyDictionary[nn.Module, Network] = WeakKeyDictionary()


def _copy_with_module(patcher: ModelPatcher) -> ModelPatcher:
    """A clone of ``patcher`` with its own nn.Module, because a module can have only one set of patches at a time.

    In inference mode the copied weights are inference tensors, like those of ComfyUI's loaders. In this mode ComfyUI
    cannot patch quantised weights that are not inference tensors.
    """
    if patcher.cached_patcher_init is not None:
        clone = patcher.deepclone_multigpu()  # ComfyUI reloads the file and keeps the patches
        move_injections(clone, patcher.model, clone.model)
        return clone
    comfy.model_management.unload_model_and_clones(patcher)  # the module goes back to its unpatched weights
    module = copy_module(patcher.model, torch.clone)
    clone = patcher.clone(model_override=(module, ({}, {}, {}, set())))
    clone.hook_backup = {}
    move_injections(clone, patcher.model, module)
    return clone


def resolve_patchers(base: ModelPatcher, experts: Sequence[Expert], conds: dict[str, list[dict]]) -> list[ModelPatcher]:
    """One patcher per expert, such that no two models of the run need different weights on one module.

    ``conds``: the sampler's conditionings. The function is called when sampling starts, because a LoRA may be
    added to the base after the blend. Clones that share a module do not know each other's hooks, so a model with hooks
    also needs its own copy of the weights.
    """
    base_hooked = any("hooks" in c for cond in conds.values() for c in cond)
    placed, patchers = [(base, base_hooked)], []
    for expert in experts:
        patcher = expert.patcher
        if expert.settings.is_off:  # it is not loaded, so it needs no separate module
            patchers.append(patcher)
            continue
        hooked = comfy.sampler_helpers.cond_has_hooks(expert.conditionings()) or (
            base_hooked and (expert.positive is None or expert.negative is None or len(conds) > 2)
        )
        if any(
            patcher.is_clone(other) and (hooked or other_hooked or not same_module(patcher, other))
            for other, other_hooked in placed
        ):
            patcher = expert.with_own_weights()
        if patcher.is_dynamic() and hooked:
            # CFGGuider does the same for the base
            patcher = patcher.get_non_dynamic_delegate()  # ty: ignore[missing-attribute]  # dynamic patchers have it
        placed.append((patcher, hooked))
        patchers.append(patcher)
    return patchers


def check_latent_space(base: ModelPatcher, expert: ModelPatcher, label: str) -> None:
    """Raise ValueError if the expert has another latent space, or a noise process that cannot be converted."""
    ours, theirs = (LatentSpace.of(latent_format_of(m)) for m in (base, expert))
    if ours != theirs:
        raise ValueError(
            f"the latent format of '{label}' is {theirs}, that of the base is {ours}; choose an expert with the latent space of"
            " the base, or pass the finished image on: decode it, encode it with the expert's VAE, and sample it with the"
            " expert at a denoise below 1"
        )
    Conversion(sampling_of(base), sampling_of(expert))


class Control(Protocol):
    """A ControlNet of any kind, linked to the previous ControlNet of its chain. Its copies share its network."""

    previous_controlnet: "Control | None"
    control_model: nn.Module
    control_model_wrapped: ModelPatcher

    def copy(self) -> "Control": ...

    def set_previous_controlnet(self, controlnet: "Control") -> Any: ...

    def deepclone_multigpu(self, load_device: torch.device) -> "Control": ...


Network = tuple[nn.Module, ModelPatcher]  # the network of a ControlNet, and its patcher

# ControlNets whose pre_run() writes weights of the sampled model into their network
WRITES_INTO_NETWORK = (comfy.controlnet.ControlNetSD35,)


def _chain_of(control: Control | None) -> Iterator[Control]:
    while control is not None:
        yield control
        control = control.previous_controlnet


def effective_conditionings(expert: Expert, conds: Mapping[str, Sequence[dict]]) -> list[dict]:
    """The options of all conditionings of an expert.

    ``conds``: the sampler's conditionings, which are used in place of inputs that are not connected.
    """
    wired = {"positive": expert.positive, "negative": expert.negative}
    unwired = [options for name, cond in conds.items() if wired.get(name) is None for options in cond]
    return [options for _, options in expert.conditionings()] + unwired


def own_networks(
    base: ModelPatcher, experts: Sequence[Expert], patchers: Sequence[ModelPatcher], conds: Mapping[str, Sequence[dict]]
) -> list[dict[nn.Module, Network]]:
    """For each expert, the copies of ControlNet networks that it needs, by the network that they replace.

    A network is copied only if its ControlNet writes into it and another module of the run uses it, too. ``patchers``:
    the experts' patchers, see ``resolve_patchers``; ``conds``: the sampler's conditionings.
    """
    users: dict[nn.Module, nn.Module] = {}  # the first model that uses a network
    for control in _controls_in(options for cond in conds.values() for options in cond):
        users.setdefault(control.control_model, base.model)
    found: list[dict[nn.Module, Network]] = []
    for expert, patcher in zip(experts, patchers, strict=True):
        own: dict[nn.Module, Network] = {}
        if not expert.settings.is_off:
            for control in _controls_in(effective_conditionings(expert, conds)):
                if users.setdefault(control.control_model, patcher.model) is not patcher.model:
                    own[control.control_model] = expert.with_own_network(control)
        found.append(own)
    return found


def _controls_in(conds: Iterable[dict]) -> Iterator[Control]:
    """The ControlNets of ``conds`` that write into their network."""
    return (c for options in conds for c in _chain_of(options.get("control")) if isinstance(c, WRITES_INTO_NETWORK))


def copy_controls(control: Control, networks: Mapping[nn.Module, Network]) -> Control:
    """Copies of ``control`` and of the ControlNets before it in its chain.

    ``networks`` maps an original network to the network that the copy uses instead.
    """
    duplicate = control.copy()
    own = networks.get(getattr(control, "control_model", None))
    if own is not None:
        duplicate.control_model, duplicate.control_model_wrapped = own
    if control.previous_controlnet is not None:
        duplicate.set_previous_controlnet(copy_controls(control.previous_controlnet, networks))
    return duplicate
