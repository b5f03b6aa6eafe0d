"""Differences between two patchers of one checkpoint: whether they can share a module, and a batch.

ComfyUI clones a ModelPatcher at every node that changes a MODEL, and all clones share one module. Two clones in one run
can share the module only if they change its weights and its code in the same way. Their rows can share a batch only if
their forward passes are also the same. ``FIELDS`` contains every field that ``ModelPatcher.clone()`` copies, and what a
difference in this field means.
"""

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

from comfy.model_patcher import ModelPatcher

from .attachments import Attachment

# what a field describes, and so what a difference in it means
MODULE = "module"  # weights, code or device of the module: patchers that differ need separate modules
FORWARD = "forward pass"  # how a run calls the module: patchers that differ can share the module, but not a batch
IDENTITY = "identity"  # which module it is: not compared here, since is_clone() compares it
STATE = "state"  # effects of earlier runs and loads, which a clone takes over with its module: not compared
RUN = "run"  # whole runs or conditionings: not compared here; hooks of conditionings are compared where they are used


DEPTH = 16  # largest nesting of functions and containers; values nested more deeply count as different


def same_value(a: Any, b: Any, depth: int = DEPTH) -> bool:
    """Whether two patches, or dictionaries and lists of them, have the same contents.

    Tensors, modules and other objects are the same if they are one object. Functions are the same if they are one
    function, or the same code with the same enclosed values, as when the same node made both.
    """
    if a is b:
        return True
    if depth == 0:
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[k], b[k], depth - 1) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_value(x, y, depth - 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, (bool, int, float, str, bytes)) and type(a) is type(b):
        return a == b
    if isinstance(a, MethodType) and isinstance(b, MethodType):
        return a.__func__ is b.__func__ and a.__self__ is b.__self__
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        if a.__code__ is not b.__code__:
            return False
        enclosed = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (a, b)]
        parts = [[f.__defaults__, f.__kwdefaults__, *cells] for f, cells in zip((a, b), enclosed, strict=True)]
        return same_value(parts[0], parts[1], depth - 1)
    return False


def _equal(a: Any, b: Any) -> bool:
    return a == b


def _same_models(a: dict[str, Sequence[ModelPatcher]], b: dict[str, Sequence[ModelPatcher]]) -> bool:
    """Whether additional models are clones of the same checkpoints with the same changes.

    Models of this pack (a Cas-DM head) act after a forward pass, so they do not count.
    """
    a, b = ({k: v for k, v in models.items() if not k.startswith("chorus_")} for models in (a, b))
    if a.keys() != b.keys() or any(len(a[k]) != len(b[k]) for k in a):
        return False
    pairs = [pair for k in a for pair in zip(a[k], b[k], strict=True)]
    return all(x is y or (x.is_clone(y) and same_module(x, y) and same_forward(x, y)) for x, y in pairs)


def _always(a: Any, b: Any) -> bool:
    return True


# field of ModelPatcher: (what it describes, comparison of two values)
FIELDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "model": (IDENTITY, _always),
    "clone_base_uuid": (IDENTITY, _always),
    "cached_patcher_init": (IDENTITY, _always),
    "is_multigpu_base_clone": (IDENTITY, _always),
    "is_clip": (IDENTITY, _always),
    "parent": (IDENTITY, _always),
    "size": (IDENTITY, _always),
    "load_device": (MODULE, _equal),
    "offload_device": (STATE, _always),  # where the module waits between runs
    "weight_inplace_update": (STATE, _always),  # how weights are patched, not which weights
    "patches": (MODULE, lambda a, b: a.keys() == b.keys()),
    "patches_uuid": (MODULE, _equal),  # new after every change of ``patches``
    "object_patches": (MODULE, same_value),
    "weight_wrapper_patches": (MODULE, same_value),
    "injections": (MODULE, same_value),
    "force_cast_weights": (MODULE, _equal),
    "forced_hooks": (MODULE, _equal),
    "model_options": (FORWARD, same_value),
    "wrappers": (FORWARD, same_value),
    "callbacks": (FORWARD, same_value),
    "attachments": (RUN, _always),  # read by wrappers and injections, see same_module()
    "additional_models": (FORWARD, _same_models),
    "skip_injection": (STATE, _always),
    "is_injected": (STATE, _always),
    "backup": (STATE, _always),
    "backup_buffers": (STATE, _always),
    "object_patches_backup": (STATE, _always),
    "pinned": (STATE, _always),
    "hook_backup": (STATE, _always),
    "hook_patches_backup": (STATE, _always),
    "cached_hook_patches": (STATE, _always),
    "current_hooks": (STATE, _always),
    "hook_patches": (RUN, _always),
    "hook_mode": (RUN, _always),
}


def _same(a: ModelPatcher, b: ModelPatcher, kind: str, but: Sequence[str] = ()) -> bool:
    names = [name for name, (described, _) in FIELDS.items() if described == kind and name not in but]
    return all(FIELDS[name][1](getattr(a, name, None), getattr(b, name, None)) for name in names)


def same_module(a: ModelPatcher, b: ModelPatcher) -> bool:
    """Whether two clones need the same weights and code in their module, so that they can share it in one run."""
    if not _same(a, b, MODULE):
        return False
    # an injection receives its patcher, so its effect may depend on the attachments of the patcher
    return not a.injections or same_value(_foreign(a.attachments), _foreign(b.attachments))


def _foreign(attachments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in attachments.items() if not isinstance(v, Attachment)}


def same_forward(a: ModelPatcher, b: ModelPatcher, but: Sequence[str] = ()) -> bool:
    """Whether two clones call their module in the same way, except for the fields in ``but``."""
    return _same(a, b, FORWARD, but)
