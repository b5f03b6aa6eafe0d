"""The report of training a Cas-DM head."""

from ...training.report_lines import TRAINING_IMAGES, best_step, improvement, run_settings
from .training import CasDMTrainer, HeadEvaluation

UNUSED = 0.1  # the head counts as unused if r is below this at every level


def report(trainer: CasDMTrainer, before: HeadEvaluation, after: HeadEvaluation, metric: str = "metric") -> str:
    """The text of the report.

    ``before``: evaluation of the initial weights. ``after``: evaluation of the returned weights (the best checkpoint).
    """
    latents, split = trainer.latents, trainer.latents.split
    weights = sum(p.numel() for p in trainer.loop.parameters)
    which = f"{len(split.validation)} validation images" if split.unseen else TRAINING_IMAGES
    lines = [
        run_settings(trainer.loop),
        f"{weights} weights, {len(split.trained)} latents of {len(latents.buckets)} size(s)",
        f"loss on {which}: {before.loss:.5f} before, {after.loss:.5f} after: {improvement(before.loss, after.loss)}",
        _line("mean squared error", after.l2),
        *best_step(trainer.loop),
    ]
    if after.metric:
        lines.append(_line(metric, after.metric))
    gates = ", ".join(f"{percent:.0%}: {r:.2f}" for percent, r in after.gate)
    lines.append(f"r, the weight of the head, over the sampling: {gates}")
    if after.gate and max(r for _, r in after.gate) < UNUSED:
        lines.append(
            "r is small everywhere: the model alone has a lower MSE than the head. To use the head for the metric,"
            " train it with gate set to fixed"
        )
    elif after.l2["mix"] >= after.l2["theta"]:
        lines.append("the mix has no lower MSE than the model alone: train the head longer before you use it")
    return "\n".join(lines)


def _line(name: str, values: dict[str, float]) -> str:
    theta, phi, mixed = (values[name] for name in ("theta", "phi", "mix"))
    return f"{name}: model {theta:.5f}, head alone {phi:.5f}, mix {mixed:.5f}"
