"""Prints every text that a user may read: error and log messages, tooltips, and help pages.

python run.py texts              all texts
python run.py texts messages     only error and log messages, with file and line
python run.py texts tooltips     only names, descriptions and tooltips of the nodes
python run.py texts help         only the help pages
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator

from .setup import ROOT, SHIPPED

LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical"}


def text_of(node: ast.expr) -> str | None:
    """The text of an expression, with ``{expression}`` in place of each inserted value. None if it is not a text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = [
            p.value if isinstance(p, ast.Constant) else f"{{{ast.unparse(p.value)}}}"
            for p in node.values
            if isinstance(p, (ast.Constant, ast.FormattedValue))
        ]
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = text_of(node.left), text_of(node.right)
        return "".join(side or "{...}" for side in sides) if any(sides) else None
    if isinstance(node, ast.IfExp):
        return " | ".join(filter(None, (text_of(node.body), text_of(node.orelse)))) or None
    return None


def messages(source: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of every exception that is raised with a text, and of every log message."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            arguments = node.exc.args
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in LOG_METHODS
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id.lstrip("_") in ("log", "logger", "logging")
        ):
            arguments = node.args
        else:
            continue
        for argument in arguments[:1]:
            if text := text_of(argument):
                yield node.lineno, text


def print_messages() -> None:
    for path in sorted(p for folder in SHIPPED for p in (ROOT / folder).rglob("*.py")):
        for line, text in messages(path.read_text(encoding="utf-8")):
            print(f"{path.relative_to(ROOT)}:{line}: {text}")


def print_tooltips() -> None:
    nodes = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    for node, texts in nodes.items():
        print(f"{node} ({texts['display_name']}): {texts.get('description', '')}")
        for side in ("inputs", "outputs"):
            for name, entry in texts.get(side, {}).items():
                if tooltip := entry.get("tooltip"):
                    print(f"  {side[:-1]} {entry.get('name', name)}: {tooltip}")


def print_help() -> None:
    for path in sorted((ROOT / "web" / "docs").glob("*.md")):
        print(f"\n===== {path.relative_to(ROOT)}\n{path.read_text(encoding='utf-8')}")


KINDS = {"messages": print_messages, "tooltips": print_tooltips, "help": print_help}


def main(*words: str) -> int:
    if unknown := set(words) - set(KINDS):
        print(f"expected {', '.join(KINDS)} or nothing, got {' '.join(sorted(unknown))}", file=sys.stderr)
        return 1
    for kind in words or KINDS:
        KINDS[kind]()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
