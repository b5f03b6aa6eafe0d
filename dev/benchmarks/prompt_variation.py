"""Variety of the candidates of SeedSelect with and without a variation of the prompt (the input prompt_variation).

For some concepts, the same seeds are sampled with each strength of the variation:

  teacher:             the general demo checkpoint, 20 steps, cfg 4; without a variation
  student:             general-4-steps, 4 steps, cfg 1
  insensitive student: the same student, in whose noise only the share SHARE (of the standard deviation) is the noise of
                       the seed; the rest is one fixed noise. Its images are nearly equal for all seeds, as those of many
                       distilled models

Metrics, for the candidates of each concept:
  variety:  mean cosine distance of all pairs of images, by the embeddings of the image-text encoder, which is a part of
            SeedSelect's score, and by the features of the classifier, which no score uses
  score:    SeedSelect's score of the best candidate, and its mean over the candidates (lower is better)
  accuracy: share of the candidates whose concept the classifier recognises

Changes compare the same seeds of the same concepts; the intervals are bootstrapped over the concepts.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F

from .. import headless

headless.start()

import comfy.utils  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

from ...demo.concepts import load_concepts, phrase  # noqa: E402
from ...demo.modules import load_checkpoint, load_references  # noqa: E402
from ...techniques.seed_select.comfy_sampler import ComfySeedSampler, KSamplerInputs  # noqa: E402
from ...techniques.seed_select.comfy_scoring import ScoringSettings  # noqa: E402
from ..statistics import mean_of_groups, paired_difference, ratio_of_means  # noqa: E402
from .environment import publish, script_parser  # noqa: E402
from .evaluators import Evaluators  # noqa: E402
from .sampling import LATENT, encode  # noqa: E402

SHARE = 0.3
TEACHER = dict(steps=20, cfg=4.0, scheduler="normal")
STUDENT = dict(steps=4, cfg=1.0, scheduler="simple")
METRICS = ("variety", "variety by the classifier", "best score", "mean score", "accuracy")


def insensitive(model: ModelPatcher) -> ModelPatcher:
    """A clone of ``model`` that replaces all but the share SHARE of the initial noise by a fixed noise of equal norm."""
    clone, sampling = model.clone(), copy.copy(model.get_model_object("model_sampling"))
    scaled = sampling.noise_scaling

    def noise_scaling(sigma, noise, latent_image, max_denoise=False):
        fixed = torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(0)).to(noise)
        mixed = SHARE * noise + math.sqrt(1.0 - SHARE**2) * fixed
        return scaled(sigma, mixed, latent_image, max_denoise)

    sampling.noise_scaling = noise_scaling
    clone.add_object_patch("model_sampling", sampling)
    return clone


def variety(features: torch.Tensor) -> float:
    """Mean cosine distance of all pairs of the rows of ``features`` [N, D]."""
    unit = F.normalize(features.double(), dim=-1)
    count = len(unit)
    return float((1.0 - unit @ unit.T).sum() / (count * (count - 1)))


def measure(
    models: tuple, sampling: dict, concept: str, seeds: int, strength: float, evaluators: Evaluators
) -> dict[str, float]:
    """The metrics of one concept."""
    model, clip, vae = models
    latent = {"samples": torch.zeros(1, *LATENT)}
    prompts = dict(positive=encode(clip, phrase(concept)), negative=encode(clip, ""))
    inputs = KSamplerInputs(model=model, **prompts, latent_image=latent, sampler_name="euler", **sampling)
    scoring = ScoringSettings(references=load_references(concept)[0], vae=vae, clip_vision=evaluators.vision)
    sampler = ComfySeedSampler(inputs, scoring, strength)
    noises = torch.cat([sampler.noise_of(seed) for seed in range(seeds)])
    size = sampler.batch_size(seeds)
    parts = [slice(first, first + size) for first in range(0, seeds, size)]
    latents = torch.cat([sampler.generate(noises[part], seeds=list(range(seeds))[part]) for part in parts])
    scores, number = sampler.score([latents]), [c.name for c in load_concepts()].index(concept)
    found = evaluators.measure(sampler.decode(latents), torch.full([seeds], number))
    return {
        "variety": variety(found["encoder features"]),
        "variety by the classifier": variety(found["classifier features"]),
        "best score": float(scores.min()),
        "mean score": float(scores.mean()),
        "accuracy": float(found["classifier"].mean()),
    }


def summary(rows: dict[float, dict[str, np.ndarray]]) -> list[dict]:
    """A row of the table for each strength: means over the concepts, and changes from strength 0."""
    table, groups = [], np.arange(len(rows[0.0]["variety"]))
    for strength, values in rows.items():
        row = {"strength": strength, **{name: mean_of_groups(values[name], groups) for name in METRICS}}
        if strength:
            plain = rows[0.0]
            row["times the variety"] = ratio_of_means(values["variety"], plain["variety"], groups)
            name = "variety by the classifier"
            row["times the variety by the classifier"] = ratio_of_means(values[name], plain[name], groups)
            row["change"] = {name: paired_difference(values[name], plain[name], groups) for name in METRICS}
        table.append(row)
    return table


def markdown(table: dict[str, list[dict]]) -> str:
    lines = []
    for way, rows in table.items():
        for row in rows:
            cells = [f"{name} {row[name][0]:.3f} ({row[name][1]:.3f} to {row[name][2]:.3f})" for name in METRICS]
            if row["strength"]:
                mean, low, high = row["times the variety"]
                cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f}) times the variety")
                mean, low, high = row["change"]["best score"]
                cells.append(f"best score {mean:+.2f} ({low:+.2f} to {high:+.2f})")
            lines.append(f"{way}, strength {row['strength']:g}: {'; '.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--concepts", type=int, default=10, help="number of concepts")
    parser.add_argument("--seeds", type=int, default=8, help="candidates of each concept")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--name", default="prompt_variation", help="name of the result file")
    options = parser.parse_args()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    names = [c.name for c in load_concepts()]
    concepts = names[:: len(names) // options.concepts][: options.concepts]
    strengths, evaluators = [0.0, *options.strengths], Evaluators()
    with torch.inference_mode():
        student = load_checkpoint("general-4-steps")
        ways = {
            "teacher": (load_checkpoint("general"), TEACHER, [0.0]),
            "student": (student, STUDENT, strengths),
            "insensitive student": ((insensitive(student[0]), *student[1:]), STUDENT, strengths),
        }
        table = {}
        for way, (models, sampling, used) in ways.items():
            rows = {}
            for strength in used:
                found = [measure(models, sampling, c, options.seeds, strength, evaluators) for c in concepts]
                rows[strength] = {name: np.array([f[name] for f in found]) for name in METRICS}
                print(f"{way}, strength {strength:g}: measured", flush=True)
            table[way] = summary(rows)
    settings = vars(options) | {"share": SHARE, "teacher": TEACHER, "student": STUDENT}
    publish(options.name, {"settings": settings, "concepts": concepts, "ways": table}, markdown(table))


if __name__ == "__main__":
    main()
