#!/usr/bin/env python3
"""Try and test ComfyUI-Chorus.

python run.py demo         start a real ComfyUI, run ten example workflows, write their images and a page that shows them
                           to output/. --all: all example workflows that need no download
python run.py serve        start ComfyUI with this pack and keep it running; arguments such as --listen are passed to it
python run.py test         run the linter, the type checks and the quick tests, in parallel. --all: also the slow tests,
                           the robustness tests and the tests of the web page. --exhaustive: every test, before a
                           release. Other arguments are passed to pytest, for example paths that select tests
python run.py format       format the code and sort its imports, as the linter expects it
python run.py train-demo   train the weights of demo/ again, stage by stage (--status, --smoke, --help)
python run.py bench NAME   run the benchmark dev/benchmarks/NAME.py; further arguments, also --help, are passed to it.
                           bench report writes the tables of BENCHMARKS.md and README.md from the result files;
                           bench gpu measures the pack on an NVIDIA GPU, see docs/gpu.md
python run.py screenshot   take a screenshot of a workflow file in ComfyUI's page, see dev/tools/screenshot.py
                           (--server HOST:PORT)
python run.py locales      write the nodes' English texts and list missing translations (accept LANG [KEY ...])
python run.py families     try this pack with every model family and node of ComfyUI, and print the differences from
                           docs/compatibility.md (--write: update that file)
python run.py memory       compute the memory of blends of published models, and print the differences from docs/memory.md
                           (--write: update that file)
python run.py docs         build the documentation as a website in output/docs, and check its links
python run.py texts        print every text that users read: error and log messages, tooltips, help pages

Needs Python 3.10 or newer. The first run downloads packages from the package index. Writes nothing outside this folder.
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

from chorus.dev.tools.progress import SetupError  # noqa: E402
from chorus.dev.tools.server import server  # noqa: E402
from chorus.dev.tools.setup import CACHE, Host, docs_python, environment, find_host, module, need_tools  # noqa: E402


def host_for(options) -> Host:
    # Links are not resolved: if custom_nodes/ contains a link to this folder, the path of the link leads to ComfyUI
    return find_host(options.comfyui, Path(__file__).absolute().parent)


def call(host: Host, command: list[str]) -> int:
    return subprocess.run(command, cwd=ROOT, env=environment(host)).returncode


# the workflows of `python run.py demo`, in this order
DEMO = (
    "Plain blend",
    "Across architectures",
    "Region mask",
    "Two styles",
    "Three models",
    "Rare concept by search",
    "Cas-DM head",
    "Refine faces by mask",
    "Masked tokens",
    "Inpaint with masked tokens",
)


def demo(options, rest: list[str]) -> int:
    known = sorted((ROOT / "example_workflows").glob("*.json"))
    chosen = [ROOT / "example_workflows" / f"{name}.json" for name in DEMO]
    workflows = [w for w in known if w.stem in options.only] if options.only else known if options.all else chosen
    if not workflows:
        got, names = ", ".join(options.only or []), ", ".join(w.stem for w in known)
        raise SetupError(f"expected a workflow of {ROOT / 'example_workflows'}, got {got}; choose from {names}")
    host = host_for(options)
    need_tools(host)
    with server(host, port=options.port, args=tuple(rest)) as running:
        files = [str(w) for w in workflows]
        return call(host, module(host, "chorus.dev.tools.run_workflows", running.address, str(ROOT / "output"), *files))


def serve(options, rest: list[str]) -> int:
    host = host_for(options)
    with server(host, port=options.port or 8188, args=tuple(rest), quiet=False) as running:
        print(f"ComfyUI with Chorus is running: http://{running.address} (stop it with Ctrl+C)", flush=True)
        return running.process.wait()


def test(options, rest: list[str]) -> int:
    host = host_for(options)
    need_tools(host)
    # the tests run in two processes with one thread each
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    codes = {"linter": call(host, module(host, "ruff", "check", "."))}
    codes["formatting"] = call(host, module(host, "ruff", "format", "--check", "."))
    codes["type checks"] = call(host, module(host, "chorus.dev.tools.check_types"))
    tests = module(host, "pytest", *pytest_arguments(options, rest))
    codes["tests"] = subprocess.run(tests, cwd=ROOT, env={**threads, **environment(host)}).returncode
    # last, because the output of the first steps is far above that of the tests
    if failed := [name for name, code in codes.items() if code]:
        print(f"failed: {', '.join(failed)}", flush=True)
    if codes["linter"] or codes["formatting"]:
        print("`python run.py format` formats the code and sorts its imports", flush=True)
    return next((code for code in reversed(codes.values()) if code), 0)


def format_code(options, rest: list[str]) -> int:
    if rest:
        raise SetupError(f"expected no further arguments, got {' '.join(rest)}; all files are formatted")
    host = host_for(options)
    need_tools(host)
    # ruff format leaves the order of imports as it is. Other errors are not corrected: that could change what code does
    sort = module(host, "ruff", "check", "--select", "I", "--fix", ".")
    return call(host, sort) or call(host, module(host, "ruff", "format", "."))


def pytest_arguments(options, rest: list[str]) -> list[str]:
    """The pytest arguments of the chosen set of tests, then the user's arguments, which take precedence.

    Tests that are selected by path run in one process.
    """
    found = ["--durations=20"]
    if any((ROOT / word.partition("::")[0]).resolve().is_relative_to(ROOT / "tests") for word in rest):
        return [*found, *([] if options.exhaustive else ["-m", "not exhaustive"]), *rest]
    if not (options.all or options.exhaustive):
        found += ["-m", "not slow and not exhaustive", "--ignore=tests/robustness", "--ignore=tests/browser"]
    elif not options.exhaustive:
        found += ["-m", "not exhaustive"]
    # loadfile: the tests of a file share fixtures. No reordering: the tests of the web page must run last in a process
    return [*found, "-n2", "--dist=loadfile", "--no-loadscope-reorder", *rest]


def train_demo(options, rest: list[str]) -> int:
    host = host_for(options)
    need_tools(host)  # resvg-py renders the vector emoji
    command = module(host, "chorus.dev.recipes", *rest)
    if os.name != "posix":
        return call(host, command)
    os.chdir(ROOT)
    # replaces this process, so that a signal reaches the training, which then saves its state
    os.execve(command[0], command, environment(host))


def benchmarks() -> list[str]:
    """Names of the benchmarks."""
    files = (ROOT / "dev" / "benchmarks").glob("*.py")
    return sorted(path.stem for path in files if "def main" in path.read_text(encoding="utf-8"))


def bench(options, rest: list[str]) -> int:
    names = benchmarks()
    if not rest or rest[0] not in names:
        got = repr(rest[0]) if rest else "nothing"
        raise SetupError(f"expected the name of a benchmark, got {got}; choose from {', '.join(names)}")
    host = host_for(options)
    return call(host, module(host, f"chorus.dev.benchmarks.{rest[0]}", *rest[1:]))


def locales(options, rest: list[str]) -> int:
    host = host_for(options)
    return call(host, module(host, "chorus.dev.tools.locales", *rest))


def families(options, rest: list[str]) -> int:
    host = host_for(options)
    need_tools(host)  # the families tool uses helpers of the tests
    return call(host, module(host, "chorus.dev.tools.families", *rest))


def memory(options, rest: list[str]) -> int:
    host = host_for(options)
    need_tools(host)  # the memory tool uses the list of model families of the tests
    return call(host, module(host, "chorus.dev.tools.memory", *rest))


def texts(options, rest: list[str]) -> int:
    return call(host := host_for(options), module(host, "chorus.dev.tools.texts", *rest))


def docs(options, rest: list[str]) -> int:
    if rest:
        raise SetupError(f"expected no further arguments, got {' '.join(rest)}; the website is written to output/docs")
    command = module(Host(ROOT, docs_python(), None), "chorus.dev.tools.docs_site")  # needs neither ComfyUI nor torch
    return subprocess.run(command, cwd=ROOT).returncode


def screenshot(options, rest: list[str]) -> int:
    host = host_for(options)
    need_tools(host)
    with contextlib.ExitStack() as stack:
        if not (address := options.server):
            # a new base directory, because outputs of earlier runs would change the numbers in the file names
            base = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=CACHE)))
            address = stack.enter_context(server(host, base)).address
        return call(host, module(host, "chorus.dev.tools.screenshot", address, *rest))


COMMANDS = {
    "demo": demo,
    "serve": serve,
    "test": test,
    "format": format_code,
    "train-demo": train_demo,
    "bench": bench,
    "locales": locales,
    "families": families,
    "memory": memory,
    "docs": docs,
    "texts": texts,
    "screenshot": screenshot,
}


def main(argv: list[str]) -> int:
    command = next((word for word in argv if word in COMMANDS), None)
    form = argparse.RawDescriptionHelpFormatter
    # train-demo and each benchmark have a separate --help
    named = argv[argv.index(command) + 1 :][:1] if command == "bench" else []
    add_help = command != "train-demo" and not {*named} & {*benchmarks()}
    # abbreviated options are not expanded, because unknown arguments are passed to ComfyUI or pytest unchanged
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False, add_help=add_help)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--comfyui", metavar="PATH", help="use this ComfyUI, with the Python that runs run.py")
    if command in ("demo", "serve"):
        parser.add_argument(
            "--port", type=int, help="the server's port (default: 8188 for serve, any free port for demo)"
        )
    if command == "test":
        parser.add_argument(
            "--all",
            action="store_true",
            help="also run the slow tests, the robustness tests and the tests of the web page",
        )
        parser.add_argument(
            "--exhaustive",
            action="store_true",
            help="run every test, and cancel runs at every interrupt point; required before a release",
        )
    if command == "demo":
        parser.add_argument("--all", action="store_true", help="run all example workflows that need no download")
        parser.add_argument("--only", action="append", metavar="NAME", help="run this workflow; may be repeated")
    if command == "screenshot":
        parser.add_argument("--server", metavar="HOST:PORT", help="use this running server (default: start a new one)")
    sys.stdout.reconfigure(errors="replace")  # Windows consoles cannot print every character
    options, rest = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped
    try:
        return COMMANDS[options.command](options, rest)
    except SetupError as error:
        print(f"run.py {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036 (a clear message on older versions)
        sys.exit(f"run.py needs Python 3.10 or newer, this is {sys.version.split()[0]}")
    sys.exit(main(sys.argv[1:]))
