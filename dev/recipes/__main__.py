"""Trains the weights of the demo, stage by stage; a new start resumes a stopped training.

python run.py train-demo [STAGE ...]
"""

import argparse
import sys
import tempfile
import time

from . import bundle, chain, loop, state
from .errors import RecipeError


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py train-demo", description=__doc__)
    known = ", ".join(stage.name for stage in chain.STAGES)
    parser.add_argument(
        "names", nargs="*", metavar="stage", help=f"any of {known} (default: all stages that are not done)"
    )
    parser.add_argument("--status", action="store_true", help="print a table of the stages and exit")
    parser.add_argument("--smoke", action="store_true", help="run every stage for a few steps, in a temporary folder")
    parser.add_argument(
        "--bundle", metavar="DIR", help="write a folder in which one stage trains offline with torch and numpy only"
    )
    parser.add_argument(
        "--export", action="store_true", help="save the weights of one unfinished stage in demo/weights, and exit"
    )
    parser.add_argument("--collect", metavar="DIR", help="import the weights and the state of a bundle")
    options = parser.parse_args(argv)
    try:
        return run(options)
    except RecipeError as error:
        print(f"train-demo: {error}", file=sys.stderr)
        return 1
    except loop.Interrupted:
        return 143


def run(options):
    def report(line):
        print(line, flush=True)

    if options.status:
        report(chain.status())
        return 0
    if options.collect:
        bundle.collect(options.collect, report)
        return 0
    chosen = chain.find(options.names)
    if options.bundle:
        if len(chosen) != 1:
            raise RecipeError(
                f"--bundle: expected one stage, got {len(chosen)}; name one of the long stages, such as general"
            )
        size = bundle.write(chosen[0], options.bundle)
        report(f"{options.bundle}: {size / 1e6:.1f} MB; copy this folder and run `python train.py` in the copy")
        return 0
    if options.export:
        if len(chosen) != 1:
            raise RecipeError(f"--export: expected one stage, got {len(chosen)}; name the stage")
        chain.export(chosen[0], report)
        return 0
    loop.use_all_cores()
    if options.smoke:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="chorus-train-") as folder:
            chain.smoke(folder, report)
        report(f"smoke test of {len(chain.STAGES)} stages: {time.monotonic() - started:.0f} s")
        return 0
    report(f"state: {state.folder()}")
    chain.run(chosen, report=report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
