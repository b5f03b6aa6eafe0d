"""Widgets shared by the training nodes, and functions that read their values.

Ids and limits are the same for all trainings; defaults and tooltips that differ are arguments.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from comfy_api.latest import io, ui

from ..host.training_metrics import NONE
from ..host.training_run import TrainingRun
from ..training.loop import Training

MOST_STEPS = 1_000_000

Value = TypeVar("Value")
Settings = TypeVar("Settings", bound=Training)


def steps(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=2, max=MOST_STEPS, tooltip=tooltip)


def batch_size(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("batch_size", default=default, min=1, max=1024, tooltip=tooltip)


def learning_rate(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input("learning_rate", default=default, min=1e-6, max=1e-2, step=1e-6, tooltip=tooltip)


def gradient_accumulation() -> io.Int.Input:
    return io.Int.Input(
        "gradient_accumulation",
        default=1,
        min=1,
        max=1024,
        advanced=True,
        tooltip="Batches per step: the effect of a larger batch, with the memory of a single batch.",
    )


def ema_decay() -> io.Float.Input:
    return io.Float.Input(
        "ema_decay",
        default=0.999,
        min=0.0,
        max=0.9999,
        step=0.0001,
        advanced=True,
        tooltip="Decay of the moving average of the weights. This average is returned. 0: the last weights are returned.",
    )


def seed(tooltip: str) -> io.Int.Input:
    """The ``seed`` widget. It stays fixed after a run, since a new seed would start the training again."""
    control = io.ControlAfterGenerate.fixed
    return io.Int.Input(
        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=control, tooltip=tooltip
    )


def weight(name: str, default: float, tooltip: str, most: float = 20.0, step: float = 0.05) -> io.Float.Input:
    """The widget ``name`` for the weight of a term of the loss; 0 removes the term."""
    return io.Float.Input(name, default=default, min=0.0, max=most, step=step, advanced=True, tooltip=tooltip)


def validation_fraction(tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        "validation_fraction", default=0.1, min=0.0, max=0.9, step=0.01, advanced=True, tooltip=tooltip
    )


def checkpoints(prefix: str) -> list[io.Input]:
    """The widgets ``checkpoint_every`` and ``checkpoint_prefix``."""
    return [
        io.Int.Input(
            "checkpoint_every",
            default=0,
            min=0,
            max=MOST_STEPS,
            advanced=True,
            tooltip="Save a checkpoint every n steps. 0: never. An interrupted run always saves one.",
        ),
        io.String.Input(
            "checkpoint_prefix",
            default=prefix,
            advanced=True,
            tooltip="Folder and name, below the output folder, of all checkpoints, including that of an interrupted run.",
        ),
    ]


def preview_every(tooltip: str) -> io.Int.Input:
    return io.Int.Input("preview_every", default=0, min=0, max=MOST_STEPS, advanced=True, tooltip=tooltip)


def gradient_checkpointing(default: bool, tooltip: str) -> io.Boolean.Input:
    return io.Boolean.Input("gradient_checkpointing", default=default, advanced=True, tooltip=tooltip)


def results(trained: io.Output, report: str) -> list[io.Output]:
    """Outputs of a training node: ``trained``, the losses and the report. ``report`` is the tooltip of the report output."""
    return [
        trained,
        io.LossMap.Output("loss_map", display_name="loss_map", tooltip="For Plot Loss Graph."),
        io.String.Output("report", display_name="report", tooltip=report),
    ]


def settings_of(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Settings of class ``kind`` from those ``values`` whose names are its fields. The metric "none" sets metric_weight to 0."""
    fields = {name: value for name, value in values.items() if name in kind.__dataclass_fields__}
    if values.get("metric") == NONE and "metric_weight" in fields:
        fields["metric_weight"] = 0.0
    return kind(**fields)


def output_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of TrainingRun for checkpoints and previews, from the input ``values``."""
    names = ("checkpoint_every", "preview_every")
    return {"prefix": values["checkpoint_prefix"]} | {name: values[name] for name in names}


def preview(run: TrainingRun, node: type[io.ComfyNode]) -> dict[str, Any]:
    """Keyword arguments of io.NodeOutput that show the preview image on the node."""
    return {} if run.image is None else {"ui": ui.PreviewImage(run.image[None], cls=node)}


def single(name: str, values: list[Value] | None) -> Value | None:
    """The value of an optional input of a node with list inputs; None if the input is not connected."""
    if not values:
        return None
    if len(values) > 1:
        raise ValueError(f"{name} holds a list of {len(values)}; connect a single one, which is used for all images")
    return values[0]
