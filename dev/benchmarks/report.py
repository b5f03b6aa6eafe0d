"""The measured claims on one page: BENCHMARKS.md, and their table in README.md, out of the result files.

python run.py bench report              write both
python run.py bench report --check      only say whether both are what the result files give

Words stand in chapters/<name>.md with {fields}; chapters/<name>.py makes the fields and the README's rows out of the
result files that it names. A field without a value and a value without a field are errors, and so is a sentence that the
results no longer bear out.
"""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .chapters import FOLDERS, ORDER
from .writing import ROOT, UNRECORDED, ReportError, anchor, fill, listed, on_gpu, table

PAGE, README = ROOT / "BENCHMARKS.md", ROOT / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TEMPLATES = Path(__file__).parent / "chapters"
NOTE = "<!-- Written by `python run.py bench report` out of the result files: change dev/benchmarks/chapters/, not this. -->"
VERSIONS = {"python": "Python", "torch": "torch", "triton": "Triton", "comfyui": "ComfyUI"}
OPTIONAL = ("triton",)


def load(file: str) -> dict | None:
    """A result file, by its path from the pack's folder; None where there is none (yet)."""
    path = ROOT / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def module(name: str) -> ModuleType:
    return import_module(f".chapters.{name}", __package__)


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.md").read_text(encoding="utf-8")


def heading(name: str) -> str:
    first = template(name).splitlines()[0]
    if not first.startswith("## "):
        raise ReportError(f"{name}.md begins with {first!r}; it must begin with '## ' and the chapter's heading")
    return first.removeprefix("## ")


def environment(result: dict) -> dict:
    """What a result says of machine, versions and command; demo/recipes keeps them otherwise than dev/benchmarks/."""
    found = result.get("environment") or {**result, "device": result.get("machine")}
    return {key: found.get(key) for key in ("device", "command", *VERSIONS)}


def origin(file: str, result: dict | None) -> str:
    """One line: the command, the file, the machine and the versions."""
    name = Path(file).name
    if result is None:
        return f"- `{file}` is not there: not measured yet."
    facts = environment(result)
    command = f"`{facts['command']}`" if facts["command"] else f"command {UNRECORDED}"
    known = [
        f"{title} {facts[key] or UNRECORDED}" for key, title in VERSIONS.items() if facts[key] or key not in OPTIONAL
    ]
    return f"- {command}: [{name}]({file}), on {facts['device'] or UNRECORDED}; {', '.join(known)}."


def chapter(name: str) -> str:
    made = module(name)
    results = [load(file) for file in made.RESULTS]
    origins = "\n".join(origin(file, result) for file, result in zip(made.RESULTS, results))
    return f"{fill(template(name), made.fields(*results), name).strip()}\n\nMeasured by\n\n{origins}\n"


def used() -> list[str]:
    return [file for name in ORDER for file in module(name).RESULTS]


def unused() -> list[str]:
    """Result files that no chapter tells of."""
    there = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob("*.json")}
    return sorted(there - set(used()))


def hardware() -> dict[str, str]:
    """What both pages say of all result files."""
    found = [environment(result) for file in used() if (result := load(file))]
    gpus = dict.fromkeys(one["device"] for one in found if on_gpu(one))
    machines = {}
    for name, _, cores in (one["device"].partition(", ") for one in found if not on_gpu(one)):
        machines.setdefault(name, {})[cores] = True
    recorded = [one for one in found if one["comfyui"]]
    versions = (f"ComfyUI {one['comfyui']}, torch {one['torch'].partition('+')[0]}" for one in recorded)
    return {
        "devices": listed([*gpus, *(f"{name} ({' or '.join(cores)})" for name, cores in machines.items())]),
        "versions": "; ".join(dict.fromkeys(versions)),
        "gpu": f"On a GPU ({', '.join(gpus)}): see the chapters." if gpus else "**Nothing was measured on a GPU.**",
    }


def claims() -> dict[str, str]:
    """The README's tables: of what holds, and of what fell short."""
    rows = {False: [], True: []}
    for name in ORDER:
        made = module(name)
        link = f"[details](BENCHMARKS.md#{anchor(heading(name))})"
        for claim in made.claims(*(load(file) for file in made.RESULTS)):
            aim = claim.aim.replace("missed", "**missed**").replace("undecided", "**undecided**")
            rows[claim.fell_short].append([claim.what, claim.measured, aim, link])
    head = ["claim", "measured", "aim", ""]
    return {"holds": table(head, rows[False]), "fell_short": table(head, rows[True])}


def page() -> str:
    """BENCHMARKS.md"""
    contents = "\n".join(f"- [{heading(name)}](#{anchor(heading(name))})" for name in ORDER)
    first = fill(template("introduction"), {**hardware(), "contents": contents}, "introduction")
    return "\n".join([NOTE, "", first, *(chapter(name) for name in ORDER)])


def block() -> str:
    """What stands between the marks in README.md."""
    fields = {**hardware(), **claims()}
    return f"{BEGIN}\n{NOTE}\n\n{fill(template('readme'), fields, 'readme').strip()}\n\n{END}"


def readme(text: str) -> str:
    """README.md with a new block."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ReportError(f"README.md lacks the lines {BEGIN} and {END}: put them where the table shall stand")
    return f"{before}{block()}{after}"


def pages() -> dict[Path, str]:
    if lost := unused():
        raise ReportError(
            f"no chapter tells of {', '.join(lost)}: name the files in RESULTS of one in dev/benchmarks/chapters/"
        )
    return {PAGE: page(), README: readme(README.read_text(encoding="utf-8"))}


def outdated(made: dict[Path, str]) -> list[Path]:
    return [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is not up to date")
    options = parser.parse_args()
    try:
        made = pages()
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    old = outdated(made)
    for path in made:
        state = "not up to date: python run.py bench report" if options.check else "written"
        print(f"{path.name}: {state if path in old else 'up to date'}")
    for path in [] if options.check else old:
        part = path.with_suffix(".part")
        part.write_text(made[path], encoding="utf-8", newline="\n")
        part.replace(path)
    return 1 if options.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
