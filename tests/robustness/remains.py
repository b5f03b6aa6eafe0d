"""What a run could leave behind: on the models that it used, and in the process."""

import random

import comfy.model_management
import comfy.utils
import numpy
import torch

from chorus.techniques.saliency_blend.comfy_hook import blend_chain


def patchers_of(*wired) -> list:
    """Every ModelPatcher behind what is wired: MODELs with the experts of their blends, VAEs, encoders, all the others."""
    found, waiting = [], list(wired)
    while waiting:
        one = waiting.pop()
        patcher = getattr(one, "patcher", one)
        if not hasattr(patcher, "get_key_patches"):  # a masked token model
            waiting += [one.transformer, one.vq]
        elif not any(patcher is p for p in found):
            found.append(patcher)
            for expert in blend_chain(patcher).experts:
                waiting += [expert.patcher, *([] if expert._own_copy is None else [expert._own_copy])]
            waiting += [p for patchers in patcher.additional_models.values() for p in patchers]
    return found


def plain_weights(patcher) -> dict[str, torch.Tensor]:
    """Without the patches that the host has merged into what is loaded."""
    weights = dict(patcher.model.state_dict())
    for key, kept in patcher.backup.items():
        weights[key] = kept.weight if hasattr(kept, "weight") else kept
    return {name: weight.detach().cpu() for name, weight in weights.items() if isinstance(weight, torch.Tensor)}


class Remains:
    """How things were when it was made; ``check`` fails where they have changed."""

    def __init__(self, *wired):
        self.wired = wired
        self.patchers = patchers_of(*wired)
        self.weights = [{k: w.clone() for k, w in plain_weights(p).items()} for p in self.patchers]
        self.states = [state_of(p) for p in self.patchers]
        self.process = process()

    def check(self, where: str, draws: bool = False) -> None:
        """``draws``: such a run draws from generators of the process, for what changes no result: the host's KSampler seeds
        torch's, new layers have first weights from it, and names of the host's temporary files are random."""
        now = process()
        skipped = {"torch's draws", "Python's draws"} if draws else set()
        changed = [k for k, v in self.process.items() if now[k] != v and k not in skipped]
        assert not changed, f"{where}: {changed} changed: {[(self.process[k], now[k]) for k in changed]!r:.300}"
        assert all(any(p is q for q in self.patchers) for p in patchers_of(*self.wired)), f"{where}: a new patcher"
        for patcher, weights, state in zip(self.patchers, self.weights, self.states, strict=True):
            name, found = type(patcher.model).__name__, state_of(patcher)
            changed = {k: (v, found[k]) for k, v in state.items() if found[k] != v}
            assert not changed, f"{where}: {name}: {changed!r:.500}"
            ours = plain_weights(patcher)
            assert ours.keys() == weights.keys(), f"{where}: {name} has other weights"
            wrong = [k for k, w in weights.items() if not same_bits(ours[k], w)]
            assert not wrong, f"{where}: weights of {name} changed: {wrong[:5]}"


def process() -> dict:
    """Switches and generators of the process and this thread."""
    cudnn = torch.backends.cudnn
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "backward in several threads": torch._C._is_multithreading_enabled(),
        "hooks of saved tensors": repr(torch._C._autograd._top_saved_tensors_default_hooks(True)),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark),
        "TF32": (torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32),
        "Python's draws": hash(random.getstate()),
        "NumPy's draws": hash(numpy.random.get_state()[1].tobytes()),  # noqa: NPY002
        "torch's draws": hash(torch.get_rng_state().numpy().tobytes()),
        "in_training": comfy.model_management.in_training,
        "progress hook": comfy.utils.PROGRESS_BAR_HOOK,
    }


def state_of(patcher) -> dict:
    """What hangs on a patcher and its module, by value or, of objects, by identity."""
    modules = list(patcher.model.modules())
    return {
        "patches": {k: len(v) for k, v in patcher.patches.items()},
        "patches_uuid": patcher.patches_uuid,
        "object_patches": _plain(patcher.object_patches),
        "object_patches_backup": len(patcher.object_patches_backup),
        "attachments": _plain(patcher.attachments),
        "wrappers": _plain(patcher.wrappers),
        "callbacks": _plain(patcher.callbacks),
        "injections": _plain(patcher.injections),
        "is_injected": patcher.is_injected,
        "hooks": (len(patcher.hook_patches), len(patcher.hook_backup), patcher.hook_patches_backup is None),
        "hook mode": patcher.hook_mode,
        "current hooks": patcher.current_hooks,
        "forced hooks": patcher.forced_hooks,
        "model_options": _plain(patcher.model_options),
        "additional models": _plain(patcher.additional_models),
        "current_patcher": id(getattr(patcher.model, "current_patcher", None)),
        "training": [m.training for m in modules],
        "hooks of modules": [
            len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in modules
        ],
        "requires_grad": [p.requires_grad for p in patcher.model.parameters()],
        "gradients kept": [p.grad is not None for p in patcher.model.parameters()],
    }


def _plain(value):
    """Without empty parts, which the host makes as it looks for them."""
    if isinstance(value, dict):
        return {k: found for k, v in value.items() if (found := _plain(v)) not in ({}, [])}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def same_bits(a, b) -> bool:
    """Of tensors, and of what holds them; NaN is like itself."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or a.cpu().contiguous().numpy().tobytes() == b.cpu().contiguous().numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_bits(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b
