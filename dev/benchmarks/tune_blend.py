"""TuneBlend against the default settings, the recommended ones, and random search at equal cost.

Every prompt names an animal and another concept that no training saw together; the expert was trained on animals in
flat style, the base on all concepts in glossy style. The score is that of the node, with two prompts that say what each
model should add: "a dog in flat style" and "a tree"; with --one-line it is a single one, "a dog in flat style left of a
tree in glossy style". For each prompt:

  default:       the default settings of SaliencyNoiseBlend
  recommended:   the settings that saliency_effect.py found best over many prompts
  random search: the best of the default settings and random candidates, each scored with all steps and all seeds
  with both:     the same, with the recommended settings among the candidates, which TuneBlend also tries first
  TuneBlend:     the settings that TuneBlend finds at the same cost, in the same space, with the same seeds

Reported are images of other seeds: the score, and the hits of two evaluators that the score does not use
(saliency_effect.py explains them).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .. import headless

headless.start()

import comfy.utils  # noqa: E402

from ...demo.autoencoder import CHANNELS  # noqa: E402
from ...demo.concepts import phrase  # noqa: E402
from ...demo.modules import load_checkpoint, load_vision  # noqa: E402
from ...nodes.tune_blend import TUNED, widget_limits  # noqa: E402
from ...techniques.saliency_blend.comfy_image_score import ImageScore  # noqa: E402
from ...techniques.saliency_blend.comfy_tuning import BlendCandidates, SamplingInputs  # noqa: E402
from ...techniques.saliency_blend.tuning import Tuning, plan_tuning  # noqa: E402
from ...techniques.saliency_blend.tuning_space import Point, in_words, read_space, recommended_point  # noqa: E402
from ..statistics import mean_of_groups, paired_difference  # noqa: E402
from .environment import publish, script_parser  # noqa: E402
from .evaluators import PairEvaluators  # noqa: E402
from .saliency_effect import (  # noqa: E402
    BASE_STYLE,
    EXPERT_STYLE,
    LATENT,
    METRICS,
    Task,
    blend,
    compositions,
    encode,
)

WAYS = ("default", "recommended", "random search", "with both", "TuneBlend")
FIRST_HELD_OUT = 1000


class TunedPrompt:
    """The blend, the score and the candidates of one prompt."""

    def __init__(self, task: Task, models: Any, options: Any) -> None:
        (general, clip, vae), expert, vision = models
        positive, negative = encode(clip, [task.prompt]), encode(clip, [""])
        model, _ = blend(general, expert, positive, negative, {})
        self.options, self.task = options, task
        self.space = read_space(TUNED, ["expert 1"], widget_limits())
        inputs = SamplingInputs(
            positive=positive,
            negative=negative,
            latent_image={"samples": torch.zeros(1, CHANNELS, LATENT, LATENT)},
            seed=0,
            steps=options.steps,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
        )
        self.candidates = BlendCandidates(model, self.space, inputs, vae)
        described = [f"{phrase(task.subject)} in {EXPERT_STYLE} style", phrase(task.other)]
        if options.one_line:
            described = [f"{described[0]} {task.relation} {described[1]} in {BASE_STYLE} style"]
        self.score = ImageScore(vision, prompts=described)

    def scores(self, point: Point, steps: int, seeds: range) -> list[float]:
        return self.score(self.candidates.pictures(self.candidates.latents(point, steps, seeds))).tolist()

    def tuned(self, number: int) -> Point:
        o = self.options
        plan = plan_tuning(o.evaluations, o.steps, o.seeds)
        known = [recommended_point(self.space, self.candidates.start)]
        return Tuning(self.space, self.candidates.start, plan, self.scores, number, known).run().point

    def random_search(self, number: int) -> tuple[Point, Point]:
        """The results of random search, and of random search with the recommended settings in place of its last point."""
        o, random = self.options, np.random.default_rng([1, number])
        points = [self.candidates.start]
        while len(points) < o.evaluations // o.seeds:
            points.append(tuple(s.at(float(u)) for s, u in zip(self.space, random.random(len(self.space)))))
        points.append(recommended_point(self.space, self.candidates.start))
        scores = [float(np.mean(self.scores(point, o.steps, range(o.seeds)))) for point in points]
        count = len(points)
        return tuple(
            points[min(rows, key=lambda k: scores[k])] for rows in (range(count - 1), [*range(count - 2), count - 1])
        )

    def held_out(self, point: Point, evaluators: PairEvaluators) -> dict[str, Any]:
        """The scores and hits of images of other seeds."""
        count, task = self.options.held_out, self.task
        seeds = range(FIRST_HELD_OUT, FIRST_HELD_OUT + count)
        images = self.candidates.pictures(self.candidates.latents(point, self.options.steps, seeds))
        hits = evaluators.measure(
            images, [task.subject] * count, [task.other] * count, [task.relation] * count, EXPERT_STYLE
        )
        return {
            "settings": in_words(self.space, point).replace("\n", ", "),
            "score": self.score(images).tolist(),
            "hits": {e: {m: v.astype(bool).tolist() for m, v in metrics.items()} for e, metrics in hits.items()},
        }


def measured(options: Any) -> Iterator[dict[str, Any]]:
    """For each prompt {way: what TunedPrompt.held_out returns}. The prompts are independent of each other."""
    models = load_checkpoint("general"), load_checkpoint("expert-animals")[0], load_vision()
    evaluators = PairEvaluators()
    for number, task in enumerate(compositions(options.prompts, shift=1)):
        prompt = TunedPrompt(task, models, options)
        drawn, with_both = prompt.random_search(number)
        points = {
            "default": prompt.candidates.start,
            "recommended": recommended_point(prompt.space, prompt.candidates.start),
            "random search": drawn,
            "with both": with_both,
            "TuneBlend": prompt.tuned(number),
        }
        rows = {way: prompt.held_out(point, evaluators) for way, point in points.items()}
        shown = ", ".join(f"{way} {np.mean(row['score']):.3f}" for way, row in rows.items())
        print(f"{number + 1} of {options.prompts}, {task.prompt}: {shown}", flush=True)
        yield {"prompt": task.prompt, "ways": rows}


def columns(prompts: list[dict[str, Any]], way: str) -> dict[str, np.ndarray]:
    """{metric: one value per image} of a way over all prompts; hits as the mean of the evaluators, in percent."""
    rows = [prompt["ways"][way] for prompt in prompts]
    out = {"score": np.array([s for row in rows for s in row["score"]])}
    for metric in METRICS:
        for evaluator in rows[0]["hits"]:
            hits = [h for row in rows for h in row["hits"][evaluator][metric]]
            out[f"{metric}, {evaluator}"] = 100.0 * np.array(hits, float)
    return out


def summary(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    per = len(prompts[0]["ways"]["default"]["score"])
    groups = np.repeat(np.arange(len(prompts)), per)
    values = {way: columns(prompts, way) for way in WAYS}
    return {
        "values": {way: {m: mean_of_groups(v, groups) for m, v in values[way].items()} for way in WAYS},
        "TuneBlend minus": {
            way: {m: paired_difference(values["TuneBlend"][m], v, groups) for m, v in values[way].items()}
            for way in WAYS[:-1]
        },
    }


def markdown(found: Mapping[str, Any]) -> str:
    metrics = list(found["values"]["default"])
    lines = [f"| | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]

    def row(name: str, values: Mapping[str, Any]) -> str:
        digits = {m: 4 if m == "score" else 1 for m in metrics}
        cells = (
            f"{v:.{digits[m]}f} ({low:.{digits[m]}f} to {high:.{digits[m]}f})" for m, (v, low, high) in values.items()
        )
        return f"| {name} | {' | '.join(cells)} |"

    lines += [row(way, values) for way, values in found["values"].items()]
    lines += [row(f"TuneBlend - {way}", values) for way, values in found["TuneBlend minus"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--evaluations", type=int, default=64, help="cost of a search, in images of all steps")
    parser.add_argument("--seeds", type=int, default=4, help="seeds that a search scores")
    parser.add_argument("--held-out", type=int, default=12, help="seeds of the reported images of each prompt")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--one-line", action="store_true", help="score with a single prompt for both concepts")
    options = parser.parse_args()
    name = "tune_blend_one_line" if options.one_line else "tune_blend"
    comfy.utils.PROGRESS_BAR_ENABLED = False
    prompts: list[dict[str, Any]] = []
    with torch.inference_mode():
        for prompt in measured(options):
            prompts.append(prompt)
            found = summary(prompts)
            # written after each prompt, so that an interrupted run keeps its results
            publish(name, {"settings": vars(options), **found, "prompts": prompts}, markdown(found))


if __name__ == "__main__":
    main()
