"""python run.py train-demo --old [pca general masked_tokens evaluate ...] [--minutes M]: makes the demo weights again, in order."""

import argparse
import importlib
import inspect
import os

ORDER = (
    "pca",
    "decoder",
    "vision",
    "references",
    "sign_classifier",
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
        " sign_classifier; good on a busy CPU",
    )
    options = parser.parse_args(argv)
    unknown = [n for n in options.names if n not in ORDER + COMPARED]
    if unknown:
        parser.error(f"no recipe {', '.join(unknown)}; there are {', '.join(ORDER + COMPARED)}")
    _start_host()
    for name in [n for n in ORDER + COMPARED if n in options.names] or ORDER:
        recipe = importlib.import_module(f".{name}", __package__)
        wanted = {"minutes": options.minutes, "workers": options.workers}
        takes = inspect.signature(recipe.main).parameters
        recipe.main(**{k: v for k, v in wanted.items() if k in takes})


def _start_host():
    """comfy on the CPU, if there is no accelerator; denormals off, as they slow training tenfold."""
    import torch
    from comfy.cli_args import args

    if not torch.cuda.is_available():
        args.cpu = True
    torch.set_num_threads(min(os.cpu_count() or 1, torch.get_num_threads()))
    torch.set_flush_denormal(True)


if __name__ == "__main__":
    main()
