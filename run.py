#!/usr/bin/env python3
"""Try and test ComfyUI-Chorus.

python run.py demo         start a real ComfyUI, run the example workflows, write their pictures to output/
python run.py serve        start ComfyUI with this pack and leave it up (--listen, --port and the like go to ComfyUI)
python run.py test         lint and types, then the quick tests, in parallel (--all: the slow ones, robustness and the web page too;
                           --exhaustive: before a release; other arguments go to pytest, and of paths only these run)
python run.py train-demo   make the weights of demo/ again, stage by stage (--status, --smoke, --help; --old NAME: the first ones)
python run.py bench NAME   measure one claim again: a script of benchmarks/ (arguments go to it);
                           bench report writes the tables of BENCHMARKS.md and README.md from what was measured
python run.py screenshot   take the picture of a workflow file in ComfyUI's page (dev/tools/screenshot.py says how; --server HOST:PORT)
python run.py locales      make the nodes' English texts again, say what the translations lack (accept LANG [KEY ...])

Needs Python 3.10 and, the first time, the package index. Writes nothing outside this folder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def import_pack():
    """Make this folder importable as ``chorus``, whatever it is called."""
    if "chorus" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "chorus", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["chorus"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["chorus"])
    return sys.modules["chorus"]


import_pack()

from chorus.dev.tools.progress import Problem  # noqa: E402
from chorus.dev.tools.server import server  # noqa: E402
from chorus.dev.tools.setup import CACHE, Host, environment, find_host, module, need_tools  # noqa: E402


def host_for(options) -> Host:
    # not resolved: the custom_nodes/ of a ComfyUI may hold a link to this folder
    return find_host(options.comfyui, Path(__file__).absolute().parent)


def call(host: Host, command: list[str]) -> int:
    return subprocess.run(command, cwd=ROOT, env=environment(host)).returncode


def demo(options, rest: list[str]) -> int:
    workflows = sorted((ROOT / "example_workflows").glob("*.json"))
    if options.only:
        workflows = [w for w in workflows if w.stem in options.only]
    if not workflows:
        raise Problem(f"no workflow {' or '.join(options.only or ['*.json'])} in {ROOT / 'example_workflows'}")
    host = host_for(options)
    need_tools(host)
    with server(host, port=options.port, args=tuple(rest)) as running:
        files = [str(w) for w in workflows]
        return call(host, module(host, "chorus.dev.tools.run_workflows", running.address, str(ROOT / "output"), *files))


def serve(options, rest: list[str]) -> int:
    host = host_for(options)
    with server(host, port=options.port or 8188, args=tuple(rest), quiet=False) as running:
        print(f"ComfyUI with Chorus is up: http://{running.address} (Ctrl+C stops it)", flush=True)
        return running.process.wait()


def test(options, rest: list[str]) -> int:
    host = host_for(options)
    need_tools(host)
    # two processes share two cores better than the threads of each
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    codes = [call(host, module(host, "ruff", "check", "."))]
    codes += [call(host, module(host, "ruff", "format", "--check", "."))]
    codes += [call(host, module(host, "chorus.dev.tools.check_types"))]
    tests = module(host, "pytest", *pytest_arguments(options, rest))
    codes += [subprocess.run(tests, cwd=ROOT, env={**threads, **environment(host)}).returncode]
    return next((code for code in reversed(codes) if code), 0)


def pytest_arguments(options, rest: list[str]) -> list[str]:
    """Those of the tier, before those of the user, which win; the tests that the user names run in one process."""
    found = ["--durations=20"]
    if any((ROOT / word.partition("::")[0]).resolve().is_relative_to(ROOT / "tests") for word in rest):
        return [*found, *([] if options.exhaustive else ["-m", "not exhaustive"]), *rest]
    if not (options.all or options.exhaustive):
        found += ["-m", "not slow and not exhaustive", "--ignore=tests/robustness", "--ignore=tests/browser"]
    elif not options.exhaustive:
        found += ["-m", "not exhaustive"]
    # by file, since its tests share fixtures; in order, since those of the page must be the last of a process
    return [*found, "-n2", "--dist=loadfile", "--no-loadscope-reorder", *rest]


def train_demo(options, rest: list[str]) -> int:
    host = host_for(options)
    need_tools(host)  # resvg-py renders the vector emoji
    command = module(host, "chorus.dev.recipes", *rest)
    if os.name != "posix":
        return call(host, command)
    os.chdir(ROOT)
    # in place of this process, so that a signal reaches the training, which then saves its state
    os.execve(command[0], command, environment(host))


def bench(options, rest: list[str]) -> int:
    names = sorted(
        p.stem for p in (ROOT / "dev" / "benchmarks").glob("*.py") if "def main" in p.read_text(encoding="utf-8")
    )
    if not rest or rest[0] not in names:
        raise Problem(f"name one of the benchmarks: {', '.join(names)}")
    host = host_for(options)
    return call(host, module(host, f"chorus.dev.benchmarks.{rest[0]}", *rest[1:]))


def locales(options, rest: list[str]) -> int:
    host = host_for(options)
    return call(host, module(host, "chorus.dev.tools.locales", *rest))


def screenshot(options, rest: list[str]) -> int:
    host = host_for(options)
    need_tools(host)
    with contextlib.ExitStack() as stack:
        if not (address := options.server):
            # folders of its own: what was saved before would change the numbers in names of files
            base = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=CACHE)))
            address = stack.enter_context(server(host, base)).address
        return call(host, module(host, "chorus.dev.tools.screenshot", address, *rest))


COMMANDS = {
    "demo": demo,
    "serve": serve,
    "test": test,
    "train-demo": train_demo,
    "bench": bench,
    "locales": locales,
    "screenshot": screenshot,
}


def main(argv: list[str]) -> int:
    command = next((word for word in argv if word in COMMANDS), None)
    # no abbreviations: what is not ours goes on to ComfyUI or pytest as it is
    form = argparse.RawDescriptionHelpFormatter
    helps = command != "train-demo"  # which has a --help of its own
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False, add_help=helps)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--comfyui", metavar="PATH", help="use this ComfyUI and the Python that runs run.py")
    if command in ("demo", "serve"):
        parser.add_argument("--port", type=int, help="the server's port (serve: 8188; demo: any free one)")
    if command == "test":
        parser.add_argument("--all", action="store_true", help="also the slow tests, robustness and the web page")
        parser.add_argument("--exhaustive", action="store_true", help="every test at every point, before a release")
    if command == "demo":
        parser.add_argument("--only", action="append", metavar="NAME", help="run this workflow; may be repeated")
    if command == "screenshot":
        parser.add_argument("--server", metavar="HOST:PORT", help="use this running server; without it a new one")
    sys.stdout.reconfigure(errors="replace")  # Windows consoles cannot show every character
    options, rest = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped on the way out
    try:
        return COMMANDS[options.command](options, rest)
    except Problem as problem:
        print(f"run.py {options.command}: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036 (said plainly to those who have an older one)
        sys.exit(f"run.py needs Python 3.10 or newer, this is {sys.version.split()[0]}")
    sys.exit(main(sys.argv[1:]))
