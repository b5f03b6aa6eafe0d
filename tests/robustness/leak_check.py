"""Check that a run leaves no changes on the models that it used or in the process."""

import random

import comfy.model_management
import comfy.utils
import numpy
import torch

from chorus.techniques.saliency_blend.comfy_hook import blend_chain


def patchers_of(*wired) -> list:
    """Every ModelPatcher of the inputs ``wired``: MODELs with the experts of their blends, VAEs, and encoders."""
    patchers, pending = [], list(wired)
    while pending:
        item = pending.pop()
        patcher = getattr(item, "patcher", item)
        if not hasattr(patcher, "get_key_patches"):  # a masked token model
            pending += [item.transformer, item.vq]
        elif not any(patcher is p for p in patchers):
            patchers.append(patcher)
            for expert in blend_chain(patcher).experts:
                pending += [expert.patcher, *filter(None, [expert._copies.patcher])]
            pending += [p for group in patcher.additional_models.values() for p in group]
    return patchers


def plain_weights(patcher) -> dict[str, torch.Tensor]:
    """Weights of the model, without the patches that ComfyUI has applied to the loaded weights."""
    weights = dict(patcher.model.state_dict())
    for key, backup in patcher.backup.items():
        weights[key] = backup.weight if hasattr(backup, "weight") else backup
    return {name: weight.detach().cpu() for name, weight in weights.items() if isinstance(weight, torch.Tensor)}


class LeakCheck:
    """A snapshot of models and process. ``check`` fails if they have changed since then."""

    def __init__(self, *wired):
        self.wired = wired
        self.patchers = patchers_of(*wired)
        self.weights = [{k: w.clone() for k, w in plain_weights(p).items()} for p in self.patchers]
        self.states = [state_of(p) for p in self.patchers]
        self.process = process_state()

    def check(self, where: str, uses_global_rng: bool = False) -> None:
        """Assert that nothing has changed since the snapshot.

        ``uses_global_rng``: ignore the global random states of torch and Python, which do not affect results. ComfyUI's
        KSampler seeds torch, new layers initialise their weights, and names of temporary files are random.
        """
        now = process_state()
        ignored = {"torch's random state", "Python's random state"} if uses_global_rng else set()
        changed = [k for k, v in self.process.items() if now[k] != v and k not in ignored]
        assert not changed, f"{where}: {changed} changed: {[(self.process[k], now[k]) for k in changed]!r:.300}"
        assert all(any(p is q for q in self.patchers) for p in patchers_of(*self.wired)), (
            f"{where}: the run added a patcher to the inputs"
        )
        for patcher, weights, state in zip(self.patchers, self.weights, self.states, strict=True):
            name, found = type(patcher.model).__name__, state_of(patcher)
            changed = {k: (v, found[k]) for k, v in state.items() if found[k] != v}
            assert not changed, f"{where}: state of {name} changed: {changed!r:.500}"
            current = plain_weights(patcher)
            assert current.keys() == weights.keys(), f"{where}: {name} has different weights"
            wrong = [k for k, w in weights.items() if not same_bits(current[k], w)]
            assert not wrong, f"{where}: weights of {name} changed: {wrong[:5]}"


def process_state() -> dict:
    """Global settings and random states of the process and this thread."""
    cudnn = torch.backends.cudnn
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "multithreaded backward": torch._C._is_multithreading_enabled(),
        "saved tensor hooks": repr(torch._C._autograd._top_saved_tensors_default_hooks(True)),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark),
        "TF32": (torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32),
        "Python's random state": hash(random.getstate()),
        "NumPy's random state": hash(numpy.random.get_state()[1].tobytes()),  # noqa: NPY002
        "torch's random state": hash(torch.get_rng_state().numpy().tobytes()),
        "in_training": comfy.model_management.in_training,
        "progress hook": comfy.utils.PROGRESS_BAR_HOOK,
    }


def state_of(patcher) -> dict:
    """State of a patcher and its module; objects are compared by identity."""
    modules = list(patcher.model.modules())
    return {
        "patches": {k: len(v) for k, v in patcher.patches.items()},
        "patches_uuid": patcher.patches_uuid,
        "object_patches": _comparable(patcher.object_patches),
        "object_patches_backup": len(patcher.object_patches_backup),
        "attachments": _comparable(patcher.attachments),
        "wrappers": _comparable(patcher.wrappers),
        "callbacks": _comparable(patcher.callbacks),
        "injections": _comparable(patcher.injections),
        "is_injected": patcher.is_injected,
        "hooks": (len(patcher.hook_patches), len(patcher.hook_backup), patcher.hook_patches_backup is None),
        "hook mode": patcher.hook_mode,
        "current hooks": patcher.current_hooks,
        "forced hooks": patcher.forced_hooks,
        "model_options": _comparable(patcher.model_options),
        "additional models": _comparable(patcher.additional_models),
        "current_patcher": id(getattr(patcher.model, "current_patcher", None)),
        "training": [m.training for m in modules],
        "module hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in modules],
        "requires_grad": [p.requires_grad for p in patcher.model.parameters()],
        "has gradients": [p.grad is not None for p in patcher.model.parameters()],
    }


def _comparable(value):
    """Comparable form of ``value`` without empty containers, which ComfyUI creates on access."""
    if isinstance(value, dict):
        return {k: found for k, v in value.items() if (found := _comparable(v)) not in ({}, [])}
    if isinstance(value, (list, tuple)):
        return [_comparable(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def same_bits(a, b) -> bool:
    """Whether tensors, or containers of them, are equal bit for bit, NaN included."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or a.cpu().contiguous().numpy().tobytes() == b.cpu().contiguous().numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_bits(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b
