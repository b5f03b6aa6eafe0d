"""The report of a training of a Cas-DM head."""

from ...training.report_lines import TRAINED_ON, restored, started, verdict
from .training import CasDMTrainer, HeadEvaluation

UNUSED = 0.1  # below this r everywhere a head does next to nothing


def report(trainer: CasDMTrainer, before: HeadEvaluation, after: HeadEvaluation, metric: str = "metric") -> str:
    """``after``: of the weights that are handed out, which may be earlier ones than the last."""
    latents, split = trainer.latents, trainer.latents.split
    weights = sum(p.numel() for p in trainer.loop.parameters)
    which = f"{len(split.held)} held-out pictures" if split.unseen else TRAINED_ON
    lines = [
        started(trainer.loop),
        f"{weights} weights, {len(split.trained)} latents of {len(latents.buckets)} size(s)",
        f"loss on {which}: {before.loss:.5f} before, {after.loss:.5f} after: {verdict(before.loss, after.loss)}",
        _line("squared distance to the truth", after.l2),
        *restored(trainer.loop),
    ]
    if after.metric:
        lines.append(_line(metric, after.metric))
    gates = ", ".join(f"{percent:.0%}: {r:.2f}" for percent, r in after.gate)
    lines.append(f"r, the share of the head, over the sampling: {gates}")
    if after.gate and max(r for _, r in after.gate) < UNUSED:
        lines.append(
            "r is small everywhere, since the model alone is nearer by squares; to use what the head has learned of the"
            " metric, train one with gate fixed"
        )
    elif after.l2["mix"] >= after.l2["theta"]:
        lines.append("the mix is no nearer to the truth than the model alone: train longer before using it")
    return "\n".join(lines)


def _line(what: str, values: dict[str, float]) -> str:
    theta, phi, mixed = (values[name] for name in ("theta", "phi", "mix"))
    return f"{what}: model {theta:.5f}, head alone {phi:.5f}, mix {mixed:.5f}"
