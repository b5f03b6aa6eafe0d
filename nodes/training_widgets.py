"""The widgets that training nodes have in common. What differs between them is an argument: defaults, and what a tooltip
says of this training; ids, limits and the rest are the same for all. And how one value of an input that is a list is read.
"""

from typing import TypeVar

from comfy_api.latest import io

MOST_STEPS = 1_000_000

Value = TypeVar("Value")


def steps(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=2, max=MOST_STEPS, tooltip=tooltip)


def batch_size(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("batch_size", default=default, min=1, max=1024, tooltip=tooltip)


def learning_rate(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input("learning_rate", default=default, min=1e-7, max=1.0, step=1e-7, tooltip=tooltip)


def gradient_accumulation() -> io.Int.Input:
    return io.Int.Input(
        "gradient_accumulation",
        default=1,
        min=1,
        max=1024,
        advanced=True,
        tooltip="Batches per step: the gradient of larger ones in the memory of one.",
    )


def ema_decay() -> io.Float.Input:
    return io.Float.Input(
        "ema_decay",
        default=0.999,
        min=0.0,
        max=0.99999,
        step=0.00001,
        advanced=True,
        tooltip="How much of the moving average of the weights stays at a step. 0: none, the last weights.",
    )


def seed(tooltip: str) -> io.Int.Input:
    """Kept as it is from run to run: another would train anew."""
    control = io.ControlAfterGenerate.fixed
    return io.Int.Input(
        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=control, tooltip=tooltip
    )


def checkpoints(prefix: str) -> list[io.Input]:
    """``checkpoint_every`` and ``checkpoint_prefix``."""
    return [
        io.Int.Input(
            "checkpoint_every",
            default=0,
            min=0,
            max=MOST_STEPS,
            advanced=True,
            tooltip="Also write a file after every so many steps. 0: never. An interrupted run always writes one.",
        ),
        io.String.Input(
            "checkpoint_prefix",
            default=prefix,
            advanced=True,
            tooltip="Below the output folder, for checkpoints and for what an interrupted run has learned.",
        ),
    ]


def preview_every(tooltip: str) -> io.Int.Input:
    return io.Int.Input("preview_every", default=0, min=0, max=MOST_STEPS, advanced=True, tooltip=tooltip)


def gradient_checkpointing(default: bool, tooltip: str) -> io.Boolean.Input:
    return io.Boolean.Input("gradient_checkpointing", default=default, advanced=True, tooltip=tooltip)


def results(learned: io.Output, report: str) -> list[io.Output]:
    """What training gives: the output ``learned``, its losses, and a ``report``, whose tooltip this is."""
    return [
        learned,
        io.LossMap.Output("loss_map", display_name="loss_map", tooltip="For Plot Loss Graph."),
        io.String.Output("report", display_name="report", tooltip=report),
    ]


def single(name: str, values: list[Value] | None) -> Value | None:
    """The one value of an optional input of a node that gets lists; None where it is not wired."""
    if not values:
        return None
    if len(values) > 1:
        raise ValueError(f"{name} holds a list of {len(values)}; wire a single one, for all pictures")
    return values[0]
