"""The nodes' texts in all languages: writes the English files and lists missing and stale translations.

python run.py locales
python run.py locales accept ja                            mark all Japanese texts as up to date
python run.py locales accept ja SeedSelect.inputs.seed.tooltip [KEY ...]          only the texts with these keys

ComfyUI serves locales/<language>/nodeDefs.json, main.json and settings.json at /i18n. Its page looks up the display name
and description of a node, and the name and tooltip of its inputs (by id) and outputs (by number). This tool writes the
English texts of nodes from the schemas. Those of the page's settings and of their categories are written by hand in
locales/en: they repeat the texts in web/*.js, as a test in tests/browser checks. The other languages are written by
hand. Beside each translation, english.json contains
the English texts that were translated. A translation is stale if its English text has changed since; the report shows
the old and the new wording. A new translation is not in english.json until it is accepted.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "locales"
FILES = ("nodeDefs", "main", "settings")  # ComfyUI also reads a file for commands, which the pack does not have
SOURCE = "english"  # ComfyUI does not read this file
PROPER = "chorus"  # the category with the name of the pack, which is not translated


def nodes() -> list:
    """All nodes of nodes/, including those that are not registered: an unused entry does no harm."""
    package = importlib.import_module("chorus.nodes")
    modules = [
        importlib.import_module(f"chorus.nodes.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]
    return [node for module in modules for node in getattr(module, "NODES", [])]


def page_key(id: str) -> str:
    """The key with which the page looks up the texts of a node or an input."""
    return id.replace(".", "_")


def described(schema) -> dict:
    """The entry of a node in nodeDefs.json.

    Empty texts are omitted. The name of an output is omitted if it equals the output's type: ComfyUI translates types.
    """
    inputs = {page_key(i.id): {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs}
    outputs = {
        str(number): {"name": o.display_name if o.display_name != o.io_type else None, "tooltip": o.tooltip}
        for number, o in enumerate(schema.outputs)
    }
    return without_empty(
        {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": inputs,
            "outputs": outputs,
        }
    )


def without_empty(texts: dict) -> dict:
    """``texts`` without empty values, at any depth."""
    whole = {name: without_empty(text) if isinstance(text, dict) else text for name, text in texts.items()}
    return {name: text for name, text in whole.items() if text}


def english() -> dict[str, dict]:
    """The texts of the schemas and of the page's settings, by file."""
    schemas = [node.define_schema() for node in nodes()]
    categories = sorted({word for schema in schemas for word in schema.category.split("/")} - {PROPER})
    return {
        "nodeDefs": {page_key(schema.node_id): described(schema) for schema in schemas},
        "main": {
            "nodeCategories": {word: word for word in categories},
            "settingsCategories": read("en", "main").get("settingsCategories", {}),
        },
        "settings": read("en", "settings"),
    }


def flat(texts: dict, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) pairs; a key is the path of the text in the file, such as SeedSelect.inputs.seed.tooltip."""
    for name, text in texts.items():
        if isinstance(text, dict):
            yield from flat(text, f"{path}{name}.")
        else:
            yield path + name, text


def all_texts(files: dict[str, dict]) -> dict[str, str]:
    """The texts of all files by key. Keys are unique: no node has the id of a setting or ``nodeCategories``."""
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
    """The languages that are translated by hand."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "en")


def problems(source: dict[str, str], translated: dict[str, str], translates: dict[str, str]) -> list[str]:
    """Messages about missing, new, stale and unused texts of a translation.

    Args:
        source: the current English texts, by key.
        translated: the translated texts, by key.
        translates: the English texts from which ``translated`` was made, by key.
    """
    found = []
    for key, text in source.items():
        if not translated.get(key):
            found.append(f"missing: {key}\n    English: {text}")
        elif key not in translates:
            found.append(f"not accepted yet: {key}\n    English: {text}\n    translated: {translated[key]}")
        elif translates[key] != text:
            was = translates[key]
            found.append(f"stale: {key}\n    was: {was}\n    now: {text}\n    translated: {translated[key]}")
    gone = [key for key in {**translated, **translates} if key not in source]
    return found + [f"unused: {key}" for key in gone]


def problems_of(language: str, source: dict[str, str]) -> list[str]:
    return problems(source, translation(language), read(language, SOURCE))


def accept(language: str, source: dict[str, str], keys: tuple[str, ...] = ()) -> None:
    """Mark the texts with these keys (without keys: all texts) of a translation as up to date with the English
    texts."""
    translated, noted = translation(language), read(language, SOURCE)
    if unknown := [key for key in keys if key not in source or key not in translated]:
        raise ValueError(
            f"expected keys of {language} such as {next(iter(source))}, got {', '.join(unknown)};"
            " `python run.py locales` prints the keys of the texts to update"
        )
    taken = keys or translated
    now = {key: text if key in taken else noted.get(key) for key, text in source.items() if key in translated}
    write(language, SOURCE, {key: text for key, text in now.items() if text})


def main(*words: str) -> int:
    """Write the English texts and print a report; returns the number of languages with missing, new, stale or unused
    texts."""
    files = english()
    for name, texts in files.items():
        write("en", name, texts)
    print(f"written: {', '.join(f'locales/en/{name}.json' for name in files)}")
    source = all_texts(files)
    if words[:1] == ("accept",) and len(words) > 1:
        accept(words[1], source, words[2:])
    elif words:
        raise ValueError(
            f"expected no arguments, `accept LANGUAGE` or `accept LANGUAGE KEY ...`, got '{' '.join(words)}'"
        )
    behind = 0
    for language in languages():
        found = problems_of(language, source)
        behind += bool(found)
        print(f"{language}: {len(found)} to update among {len(source)} texts" if found else f"{language}: up to date")
        print("".join(f"  {line}\n" for line in found), end="")
        if found:
            print(
                f"  Write texts of nodes into locales/{language}/nodeDefs.json, of categories into main.json and of"
                " settings into settings.json, and remove unused ones. Then:"
                f"\n  python run.py locales accept {language} KEY [KEY ...]"
            )
    return behind


if __name__ == "__main__":
    import sys

    from .. import headless

    headless.start()
    try:
        sys.exit(main(*sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
