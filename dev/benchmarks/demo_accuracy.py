"""How often the demo checkpoints generate what the prompt names.

Two evaluators that no training and no score uses evaluate the images: an independent classifier and template matching
(evaluators.py). Prompts with one concept name only the concept, without a background. Prompts with two concepts are
compositions that no training saw. Seeds, prompts and settings are those of no other benchmark and of no training.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import headless

headless.start()

from ...demo import modules  # noqa: E402
from ...demo.concepts import load_concepts, load_frequency, phrase  # noqa: E402
from ...nodes.masked_tokens import MaskedTokenSampler  # noqa: E402
from ..recipes.classifier import named  # noqa: E402
from ..recipes.scenes import SIZE  # noqa: E402
from ..recipes.seeds import load_classifier  # noqa: E402
from ..statistics import proportion  # noqa: E402
from .environment import publish, script_parser  # noqa: E402
from .evaluators import PairEvaluators, Templates, numbers_of  # noqa: E402
from .saliency_effect import compositions  # noqa: E402
from .sampling import encode, generate  # noqa: E402

FIRST_SEED, FIRST_PAIR_SEED = 300_000, 310_000
BINS = ("frequent", "medium", "rare")
BATCH = 20
# steps, cfg, sampler, scheduler
SETTINGS: dict[str, tuple[Any, ...]] = {
    "general": (20, 4.0, "euler", "normal"),
    "expert-animals": (20, 4.0, "euler", "normal"),
    "expert-food": (20, 4.0, "euler", "normal"),
    "general-4-steps": (4, 1.0, "euler", "simple"),
    "general-1-step": (1, 1.0, "euler", "simple"),
}
DOMAINS = {"expert-animals": "animal", "expert-food": "food"}
MASKED_TOKENS = "masked tokens"
Generator = Callable[[Sequence[str], int], Tensor]  # (captions, seed) -> images [N, 128, 128, 3] in 0..1


def generator(name: str) -> Generator:
    """The images that a checkpoint, or the masked token model, generates for captions."""
    if name == MASKED_TOKENS:
        return masked_tokens()
    model, clip, vae = modules.load_checkpoint(name)
    return lambda captions, seed: vae.decode(generate(model, clip, captions, seed, *SETTINGS[name]))


def masked_tokens() -> Generator:
    model, clip = modules.load_masked_tokens()
    widgets = {i.id: i.default for i in MaskedTokenSampler.define_schema().inputs if hasattr(i, "default")}
    given = {k: v for k, v in widgets.items() if v is not None} | {"width": SIZE, "height": SIZE}

    def one(caption: str, seed: int) -> Tensor:
        words = {"positive": encode(clip, caption), "negative": encode(clip, "")}
        return MaskedTokenSampler.execute(model=model, **words, **{**given, "seed": seed}).args[0]

    return lambda captions, seed: torch.cat([one(text, seed + k) for k, text in enumerate(captions)])


def single(make: Generator, concepts: Sequence[str], seeds: int, evaluators: Any) -> dict[str, np.ndarray]:
    """{evaluator: bool [N]}: whether each image of each concept shows the concept."""
    captions = [phrase(name) for name in concepts for _ in range(seeds)]
    wanted = numbers_of(concepts).repeat_interleave(seeds)
    images = torch.cat([make(captions[k : k + BATCH], FIRST_SEED + k) for k in range(0, len(captions), BATCH)])
    classifier, templates = evaluators
    return {
        "classifier": (named(classifier, 2 * images.movedim(-1, 1) - 1) == wanted).numpy(),
        "templates": (templates.match(images).concepts()[:, 0] == wanted).numpy(),
    }


def pairs(make: Generator, count: int) -> dict[str, dict[str, np.ndarray]]:
    """{evaluator: {metric: bool [N]}} for compositions of two concepts that no training saw together."""
    tasks = compositions(count, shift=7)
    batches = [tasks[k : k + BATCH] for k in range(0, count, BATCH)]
    images = torch.cat([make([t.prompt for t in part], FIRST_PAIR_SEED + k) for k, part in enumerate(batches)])
    subjects, others, relations = ([getattr(t, name) for t in tasks] for name in ("subject", "other", "relation"))
    return PairEvaluators().measure(images, subjects, others, relations, "glossy")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="images of each concept")
    parser.add_argument("--pairs", type=int, default=100, help="images of two concepts")
    options = parser.parse_args()
    bins, evaluators = load_frequency()["bin"], (load_classifier().cpu(), Templates("alone"))
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name in (*SETTINGS, MASKED_TOKENS):
            make, domain = generator(name), DOMAINS.get(name)
            members = [c.name for c in load_concepts() if domain in (None, c.domain)]
            groups = {kind: [n for n in members if bins[n] == kind] for kind in BINS} if domain is None else {}
            rows = {}
            for group, concepts in (groups or {"all": members}).items():
                hits = single(make, concepts, options.seeds, evaluators)
                rows[group] = {"concepts": len(concepts), **{k: proportion(v) for k, v in hits.items()}}
            if name in ("general", MASKED_TOKENS):
                for evaluator, metrics in pairs(make, options.pairs).items():
                    for metric in ("scene", "placed"):
                        row = rows.setdefault(f"pairs, {metric}", {"concepts": 2})
                        row[evaluator] = proportion(metrics[metric])
            found[name] = rows
            print(name, {k: {e: round(v[e]["share"], 3) for e in ("classifier", "templates")} for k, v in rows.items()})
    lines = [f"{name}: {len(rows)} rows" for name, rows in found.items()]
    publish("demo_accuracy", {"settings": vars(options), "checkpoints": found}, "\n".join(lines))


if __name__ == "__main__":
    main()
