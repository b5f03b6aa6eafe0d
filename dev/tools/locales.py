"""The texts of the nodes in other languages: makes the English file, says what the translations lack.

python run.py locales
python run.py locales accept ja                            ja says what the English says now
python run.py locales accept ja SeedSelect.inputs.seed.tooltip          only this text, or these

ComfyUI serves locales/<language>/nodeDefs.json and main.json at /i18n; its page looks up display_name and description of a
node, name and tooltip of its inputs by id and of its outputs by number. English is made from the schemas, the rest is
written by hand. Beside each translation lies english.json: which English text each of its texts translates. A text whose
English has changed since is thereby found, and the old wording stands beside the new one in the report and in the diff.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "locales"
FILES = ("nodeDefs", "main")  # of the host's; the other two hold commands and settings, of which the pack has none
SOURCE = "english"  # not read by the host
PROPER = "chorus"  # the category that is our name and has no translation


def nodes() -> list:
    """Every node of nodes/, also those that wait to be registered: an entry that no node asks for does no harm."""
    package = importlib.import_module("chorus.nodes")
    modules = [
        importlib.import_module(f"chorus.nodes.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]
    return [node for module in modules for node in getattr(module, "NODES", [])]


def page_key(id: str) -> str:
    """An id as the page looks it up."""
    return id.replace(".", "_")


def described(schema) -> dict:
    """The entry of a node in nodeDefs.json. What is not said has no key; an output called like its type is the host's."""
    inputs = {page_key(i.id): {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs}
    outputs = {
        str(number): {"name": o.display_name if o.display_name != o.io_type else None, "tooltip": o.tooltip}
        for number, o in enumerate(schema.outputs)
    }
    return said(
        {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": inputs,
            "outputs": outputs,
        }
    )


def said(texts: dict) -> dict:
    """Without what is empty, at any depth."""
    whole = {name: said(text) if isinstance(text, dict) else text for name, text in texts.items()}
    return {name: text for name, text in whole.items() if text}


def english() -> dict[str, dict]:
    """What the schemas say, by file."""
    schemas = [node.define_schema() for node in nodes()]
    categories = sorted({word for schema in schemas for word in schema.category.split("/")} - {PROPER})
    return {
        "nodeDefs": {page_key(schema.node_id): described(schema) for schema in schemas},
        "main": {"nodeCategories": {word: word for word in categories}},
    }


def flat(texts: dict, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, text): the keys are those of the page, as in SeedSelect.inputs.seed.tooltip."""
    for name, text in texts.items():
        if isinstance(text, dict):
            yield from flat(text, f"{path}{name}.")
        else:
            yield path + name, text


def all_texts(files: dict[str, dict]) -> dict[str, str]:
    """The texts of both files by key; node ids and ``nodeCategories`` share no name."""
    return {key: text for texts in files.values() for key, text in flat(texts)}


def path_of(language: str, name: str) -> Path:
    return FOLDER / language / f"{name}.json"


def read(language: str, name: str) -> dict:
    path = path_of(language, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(language: str, name: str, texts: dict) -> None:
    path = path_of(language, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def translation(language: str) -> dict[str, str]:
    return all_texts({name: read(language, name) for name in FILES})


def languages() -> list[str]:
    """Those that are translated by hand."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "en")


def problems(source: dict[str, str], translated: dict[str, str], translates: dict[str, str]) -> list[str]:
    """What is wrong with a translation, a line each.

    Args:
        source: the English of now, by key.
        translated: the translation.
        translates: the English that it translates.
    """
    found = []
    for key, text in source.items():
        if not translated.get(key):
            found.append(f"missing: {key}\n    English: {text}")
        elif translates.get(key) != text:
            was = translates.get(key, "(english.json does not say)")
            found.append(f"stale: {key}\n    was: {was}\n    now: {text}\n    translated: {translated[key]}")
    gone = [key for key in {**translated, **translates} if key not in source]
    return found + [f"nobody asks for it: {key}" for key in gone]


def problems_of(language: str, source: dict[str, str]) -> list[str]:
    return problems(source, translation(language), read(language, SOURCE))


def accept(language: str, source: dict[str, str], keys: tuple[str, ...] = ()) -> None:
    """Note that these translations, or all that there are, say what the English says now."""
    translated, noted = translation(language), read(language, SOURCE)
    if unknown := [key for key in keys if key not in source or key not in translated]:
        raise ValueError(f"{language} translates no {', '.join(unknown)}; keys look like {next(iter(source))}")
    taken = keys or translated
    now = {key: text if key in taken else noted.get(key) for key, text in source.items() if key in translated}
    write(language, SOURCE, {key: text for key, text in now.items() if text})


def main(*words: str) -> int:
    """The number of languages in which something is missing or stale."""
    files = english()
    for name, texts in files.items():
        write("en", name, texts)
    source = all_texts(files)
    if words[:1] == ("accept",) and len(words) > 1:
        accept(words[1], source, words[2:])
    elif words:
        raise ValueError(f"'{' '.join(words)}' is none of: (nothing), accept LANGUAGE, accept LANGUAGE KEY ...")
    behind = 0
    for language in languages():
        found = problems_of(language, source)
        behind += bool(found)
        print(f"{language}: {len(found)} to mend among {len(source)} texts" if found else f"{language}: up to date")
        print("".join(f"  {line}\n" for line in found), end="")
    return behind


if __name__ == "__main__":
    import sys

    from .. import headless

    headless.start()
    try:
        sys.exit(main(*sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
