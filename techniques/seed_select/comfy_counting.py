"""Counts the batch rows that pass through the networks of a MODEL and its attachments."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...host.attachments import attached
from ...host.gradients import Recorder
from .comfy_inputs import Conds


@dataclass
class RowCounter:
    """Number of batch rows in forward passes so far."""

    rows: int = 0
    recomputed: int = 0  # how many of the rows were recomputed for a gradient
    compared: int = 0  # how many of the rows were computed to compare a gradient with finite differences

    @contextmanager
    def counting(
        self,
        models: Sequence[ModelPatcher],
        conds: Conds,
        recorder: Recorder | None = None,
    ) -> Iterator[None]:
        """Context that counts the rows of forward passes of ``models`` and of the first one's attachments, including passes
        that fail.

        ``conds``: the conditionings of the run. ``recorder``: the recorder of a run with gradients. It reports whether a pass
        is a recomputation or part of the comparison with finite differences.
        """
        model = models[0]
        patchers = [*models, *(p for attachment in attached(model) for p in attachment.patchers(model, conds))]
        if model.is_dynamic() and any("hooks" in c for cond in conds.values() for c in cond):
            # if a conditioning has hooks, the guider runs this delegate in place of the dynamic patcher
            patchers.append(model.get_non_dynamic_delegate())  # ty: ignore[missing-attribute]  # of dynamic patchers
        networks = {id(n): n for n in (p.get_model_object("diffusion_model") for p in patchers)}

        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.rows += len(inputs[0])
            if recorder is not None and recorder.comparing:
                self.compared += len(inputs[0])
            elif recorder is not None and recorder.recomputing:
                self.recomputed += len(inputs[0])

        with ExitStack() as stack:
            for network in networks.values():
                stack.callback(network.register_forward_pre_hook(count).remove)
            yield
