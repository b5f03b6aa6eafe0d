"""Lines common to the reports of all trainings."""

from .loop import TrainingLoop

# the evaluated images as reports name them if there is no validation split
TRAINING_IMAGES = "the training images (too few for a validation split)"


def run_settings(loop: TrainingLoop) -> str:
    """Line with the steps, batch sizes, learning rate and seed of a run."""
    settings = loop.settings
    resumed = f", resumed at step {loop.first_step}" if loop.resumed else ""
    return (
        f"{len(loop.losses['loss'])} steps of {settings.batch_size} x {settings.gradient_accumulation} at learning rate"
        f" {settings.learning_rate:g}, seed {settings.seed}{resumed}"
    )


def improvement(before: float, after: float) -> str:
    """Phrase that states whether the evaluation loss improved, with a remedy if it did not."""
    return "it improved" if after < before else "it did NOT improve: use more steps or another learning rate"


def best_step(loop: TrainingLoop) -> list[str]:
    """A list with one line that names the step of the best checkpoint, or an empty list if the last step is the best."""
    if loop.done == len(loop.losses["loss"]):
        return []
    return [f"the loss was lowest after {loop.done} steps of this run; the weights of that step are returned"]
