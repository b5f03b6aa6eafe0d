"""Every command that a page names exists and accepts its arguments.

The commands themselves run in CI (demo, test, docs), in tests (locales, families, memory, screenshot, train-demo --smoke,
bench gpu --smoke, bench report) or for hours (other benchmarks, whose result files name their command).
"""

import argparse
import contextlib
import importlib
import re
import shlex
import subprocess
import sys

import pytest

import chorus_run as run

COMMAND = re.compile(r"python run\.py ([^`#\n]+)")
FILES = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=run.ROOT, capture_output=True, text=True, check=True
).stdout.splitlines()
NAMED = {line.strip() for file in FILES for line in COMMAND.findall((run.ROOT / file).read_text(encoding="utf-8"))}
PLACEHOLDERS = re.compile(r"NAME|<NodeId>|robustness")  # the last one passes its arguments to pytest
BENCH = sorted(line for line in NAMED if line.startswith("bench ") and not PLACEHOLDERS.search(line))


class Parsed(Exception):
    """Raised in place of the work of a benchmark."""


def test_pages_name_commands():
    assert len(BENCH) > 20
    assert {line.split()[0] for line in NAMED} >= {"demo", "test", "bench", "docs", "families", "memory"}


@pytest.mark.parametrize("line", sorted(NAMED - {*BENCH}))
def test_command_is_one_of_run_py(line, monkeypatch):
    words = shlex.split(line)
    seen = []
    monkeypatch.setitem(run.COMMANDS, words[0], lambda options, rest: seen.append(rest) or 0)
    assert run.main(words) == 0
    paths = [word for rest in seen for word in rest if word.startswith("tests/")]
    assert all((run.ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("name", run.benchmarks())
def test_benchmark_prints_its_help(name, monkeypatch, capsys):
    module = importlib.import_module(f"chorus.dev.benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with contextlib.suppress(SystemExit):
        assert not module.main()
    assert module.__doc__.partition("\n")[0] in capsys.readouterr().out


@pytest.mark.parametrize("line", BENCH)
def test_benchmark_accepts_its_arguments(line, monkeypatch):
    name, *arguments = shlex.split(line)[1:]
    module = importlib.import_module(f"chorus.dev.benchmarks.{name}")
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(Parsed):
        module.main()
