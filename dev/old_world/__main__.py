"""python run.py train-demo --old [pca general masked_tokens evaluate ...] [--minutes M]: makes the demo weights again, in order."""

import argparse
import importlib
import inspect

from .. import headless
from ..recipes.loop import use_all_cores

ORDER = (
    "pca",
    "decoder",
    "vision",
    "references",
    "concept_classifier",
    "general",
    "expert",
    "cas_dm",
    "student",
    "face_pairs",
    "face_refiner",
    "vq",
    "masked_tokens",
    "evaluate",
    "evaluate_masked_tokens",
)
# what does not ship and is made only when it is named
COMPARED = ("cas_dm_ablations", "face_refiner_unpaired")
# recipes that are a function of another module than their own's ``main``
FUNCTIONS = {
    "general": "diffusion.general",
    "expert": "diffusion.expert",
    "cas_dm_ablations": "cas_dm.ablations",
    "face_refiner_unpaired": "face_refiner.unpaired",
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py train-demo --old", description=__doc__)
    known = ", ".join(ORDER)
    parser.add_argument(
        "names", nargs="*", metavar="recipe", help=f"any of {known} (all when none is named), or {', '.join(COMPARED)}"
    )
    parser.add_argument("--minutes", type=float, help="end the training of each named network after this time")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes with one thread each, for general, expert, student, face_pairs, vq, masked_tokens and"
        " concept_classifier; good on a busy CPU",
    )
    options = parser.parse_args(argv)
    unknown = [n for n in options.names if n not in ORDER + COMPARED]
    if unknown:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(ORDER + COMPARED)}")
    headless.start()
    use_all_cores()
    for name in [n for n in ORDER + COMPARED if n in options.names] or ORDER:
        module, _, function = FUNCTIONS.get(name, f"{name}.main").partition(".")
        recipe = getattr(importlib.import_module(f".{module}", __package__), function)
        wanted = {"minutes": options.minutes, "workers": options.workers}
        takes = inspect.signature(recipe).parameters
        recipe(**{k: v for k, v in wanted.items() if k in takes})


if __name__ == "__main__":
    main()
