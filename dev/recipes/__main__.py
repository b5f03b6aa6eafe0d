"""python run.py train-demo [STAGE ...]: makes the weights of the demo world, stage by stage; resumes wherever it stopped."""

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
        "names", nargs="*", metavar="stage", help=f"any of {known}; all that are not done without a name"
    )
    parser.add_argument("--status", action="store_true", help="print a table of the stages and leave")
    parser.add_argument("--smoke", action="store_true", help="run every stage with a few steps, in a folder of its own")
    parser.add_argument("--bundle", metavar="DIR", help="write what one stage needs to train offline with torch alone")
    parser.add_argument("--collect", metavar="DIR", help="take over what a bundle has trained")
    parser.add_argument(
        "--old",
        metavar="NAME",
        nargs=argparse.REMAINDER,
        help="recipes of the first demo world (64 px), with their options",
    )
    options = parser.parse_args(argv)
    if options.old is not None:
        from ..first_recipes.__main__ import main as old

        old(options.old)
        return 0
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
            raise RecipeError("--bundle takes the name of one stage")
        size = bundle.write(chosen[0], options.bundle)
        report(f"{options.bundle}: {size / 1e6:.1f} MB; copy it and run `python train.py` in it")
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
