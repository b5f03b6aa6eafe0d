"""What the reports of trainings have in common, line by line."""

from .loop import AveragingTrainer

TRAINED_ON = "the training pictures: too few to hold some out"  # what is looked at before and after then


def started(trainer: AveragingTrainer) -> str:
    settings = trainer.settings
    resumed = f", resumed at step {trainer.first_step}" if trainer.resumed else ""
    return (
        f"{len(trainer.losses['loss'])} steps of {settings.batch_size} x {settings.accumulation} at learning rate"
        f" {settings.learning_rate:g}, seed {settings.seed}{resumed}"
    )


def verdict(before: float, after: float) -> str:
    """By the loss on what is looked at before and after."""
    return "it learned" if after < before else "it did NOT learn: use more steps or another learning rate"


def settled(trainer: AveragingTrainer) -> list[str]:
    """A line where earlier weights than the last are handed out."""
    if trainer.done == len(trainer.losses["loss"]):
        return []
    return [f"that is after {trainer.done} steps of this run, where it was lowest; these weights are handed out"]
