"""A run of TuneBlend: the search with its progress, and the outputs of the node."""

from collections.abc import Sequence

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...common.tiles import Tile, draw_grid
from ...host.sampling_progress import SamplingProgress
from .comfy_image_score import ImageScore
from .comfy_tuning import BlendCandidates
from .tuning import Trial, Tuning, TuningPlan
from .tuning_space import Point, for_nodes, in_one_line, recommended_point
from .tuning_view import draw_surface

InterruptProcessingException = comfy.model_management.InterruptProcessingException
SHOWN = 12  # settings on the sheet and in the report

Outputs = tuple[ModelPatcher, str, Tensor, Tensor, str]  # model, settings, sheet, surface, report


class TuningRun:
    """Scores candidates with ``candidates`` and ``score``, and shows the progress."""

    def __init__(self, candidates: BlendCandidates, score: ImageScore, plan: TuningPlan) -> None:
        self.candidates, self._score, self._plan = candidates, score, plan
        # one latent [1, C, *S] on the CPU for each candidate that was sampled with all steps
        self.latents: dict[Point, Tensor] = {}
        known = [recommended_point(candidates.space, candidates.start)]
        seed = candidates.inputs.seed
        self.search = Tuning(candidates.space, candidates.start, plan, self.scores, seed, known)
        self.progress = SamplingProgress(candidates.model, round(plan.cost * plan.steps))
        candidates.callback = self._step
        self._shown: Point | None = None

    def scores(self, point: Point, steps: int, seeds: range) -> Sequence[float]:
        latents = self.candidates.latents(point, steps, seeds)
        if steps == self._plan.steps and 0 in seeds:
            self.latents[point] = latents[:1].cpu()
        return self._score(self.candidates.pictures(latents)).tolist()

    def run(self) -> bool:
        """Run the search; True if the user interrupted it after the connected settings were scored."""
        try:
            self.search.run(self._show)
        except InterruptProcessingException:
            if self.search.best is None:
                raise
            return True
        return False

    def _step(self, step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        ahead = round(self._plan.cost * self._plan.steps) - self.progress.done
        if ahead > len(x0):
            self.progress.callback(step, x0, x, steps)
            self.progress.show(steps=len(x0) - 1)

    def _show(self) -> None:
        """Show the best image and score so far."""
        best, plan = self.search.best, self._plan
        done = round(min(self.search.spent, plan.cost) * plan.steps)
        if best is None:
            return
        image = None
        if best.point != self._shown:
            self._shown, image = best.point, self.candidates.strips(self.latents[best.point])[0]
        text = f"best score {best.score:.4f}, cost {self.search.spent:.0f} of {plan.cost:g} images"
        self.progress.show(image, done - self.progress.done, text)


def tune(candidates: BlendCandidates, score: ImageScore, plan: TuningPlan | None, seeds: int) -> Outputs:
    """The outputs of the node. ``plan``: None to score only the connected settings, over ``seeds`` seeds.

    If the first interrupt of the run comes while the outputs are decoded and drawn, the outputs are still returned.
    """
    run = TuningRun(candidates, score, plan or TuningPlan(seeds, candidates.inputs.steps, seeds))
    interrupted = run.run()
    try:
        return outputs(run, plan is None, interrupted)
    except InterruptProcessingException:
        if interrupted:
            raise
        return outputs(run, plan is None, True)


def outputs(run: TuningRun, only: bool, interrupted: bool) -> Outputs:
    candidates, search = run.candidates, run.search
    best = search.best
    assert best is not None  # the run raises otherwise
    # unchanged settings give the connected model itself
    model = candidates.model if best.point == candidates.start else candidates.blended(best.point)
    labels = [expert.label for expert in candidates.chain.experts]
    settings = for_nodes(candidates.space, best.point, labels)
    lines = ["interrupted: these are the best settings so far; the node runs again only if an input changes"]
    lines = (lines if interrupted else []) + report(run, only)
    return model, settings, sheet(run)[None], draw_surface(candidates.space, search)[None], "\n".join(lines)


def sheet(run: TuningRun) -> Tensor:
    """Contact sheet [H', W', 3] of the best settings and of the connected ones, with their scores."""
    start = run.candidates.start
    tiles = []
    for place, (trial, expected) in enumerate(ranking(run), start=1):
        if place > SHOWN and trial.point != start:
            continue
        name = "connected settings" if trial.point == start else in_one_line(run.candidates.space, trial.point)
        image = run.candidates.strips(run.latents[trial.point])[0].cpu()
        tiles.append(Tile(image, (f"{place}: expected {expected:.4f}, measured {trial.score:.4f}", *wrapped(name))))
    return draw_grid(tiles)


def ranking(run: TuningRun) -> list[tuple[Trial, float]]:
    """The settings with all seeds and their expected scores, the best first."""
    finished = run.search.finished
    return list(zip(finished, run.search.estimates([t.point for t in finished])[0].tolist(), strict=True))


def wrapped(text: str, settings: int = 2) -> list[str]:
    """``text`` in lines of ``settings`` settings each."""
    parts = text.split(", ")
    return [", ".join(parts[k : k + settings]) for k in range(0, len(parts), settings)]


def report(run: TuningRun, only: bool) -> list[str]:
    search, candidates = run.search, run.candidates
    ranked, seeds = ranking(run), search.plan.seeds
    best, expected = ranked[0]
    start, of_start = next(row for row in ranked if row[0].point == candidates.start)
    if only:
        return [f"connected settings: score {start.score:.4f} over {seeds} seeds; evaluations 0, so nothing was tuned"]
    if best is start:
        first = f"the connected settings are the best found: expected score {of_start:.4f}"
    else:
        better = sum(best.scores[seed] < start.scores[seed] for seed in range(seeds))
        first = (
            f"best: expected score {expected:.4f}, connected settings {of_start:.4f}; measured {best.score:.4f} and"
            f" {start.score:.4f}, better for {better} of {seeds} seeds"
        )
    lines = [
        f"{first}. The expected score of other seeds is estimated from all images of the search",
        f"{len(search.screened)} settings tried with {search.plan.few_steps} steps, {len(search.trials)} with"
        f" {search.plan.steps} steps, of these {len(ranked)} with all {seeds} seeds; cost {search.spent:.0f} of"
        f" {search.plan.cost:g} images",
    ]
    shared = round(search.spent * search.plan.steps) - candidates.evaluated_steps
    if shared > 0:
        lines.append(f"{shared} steps before the experts' start were sampled once for several settings")
    for place, (trial, of_trial) in enumerate(ranked[:SHOWN], start=1):
        lines.append(
            f"{place}. expected {of_trial:.4f}, measured {trial.score:.4f}: {in_one_line(run.candidates.space, trial.point)}"
        )
    return lines
