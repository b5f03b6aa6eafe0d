"""Lines that the reports of all trainings have in common."""

from .loop import TrainingLoop

TRAINED_ON = "the training pictures: too few to hold some out"  # what evaluations use then


def started(loop: TrainingLoop) -> str:
    settings = loop.settings
    resumed = f", resumed at step {loop.first_step}" if loop.resumed else ""
    return (
        f"{len(loop.losses['loss'])} steps of {settings.batch_size} x {settings.gradient_accumulation} at learning rate"
        f" {settings.learning_rate:g}, seed {settings.seed}{resumed}"
    )


def verdict(before: float, after: float) -> str:
    """By the losses of the evaluations before and after."""
    return "it learned" if after < before else "it did NOT learn: use more steps or another learning rate"


def restored(loop: TrainingLoop) -> list[str]:
    """A line where the best checkpoint is not the last step."""
    if loop.done == len(loop.losses["loss"]):
        return []
    return [f"that is after {loop.done} steps of this run, where it was lowest; these weights are handed out"]
