"""Help pages: every node has one, with a picture and with the inputs and outputs of the schema in the same order."""

import ast
import functools
import json
import math
import re
from typing import NamedTuple

import pytest
from PIL import Image

from chorus import nodes
from chorus.dev.tools.setup import ROOT

DOCS = ROOT / "web" / "docs"
SCHEMAS = {schema.node_id: schema for schema in (node.define_schema() for node in nodes.NODES)}
FURTHER = ["With SamplerCustomAdvanced", "Videos", "On several machines"]  # as needed
HEADINGS = ["Try first", "Inputs", "Outputs", "Cost", "Good to know", *FURTHER, "Paper"]
OPTIONAL = {"Good to know", *FURTHER, "Paper"}
MIN_SIDE, MAX_WIDTH, MAX_HEIGHT, MAX_BYTES = 200, 900, 1000, 120_000
IMAGE = re.compile(r"!\[(.*?)\]\((.*?)\)", re.S)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((.*?)\)", re.S)
ARXIV = re.compile(r"https://arxiv\.org/abs/(\d{4}\.\d{5})")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?")


class Page(NamedTuple):
    title: str
    opening: list[str]  # paragraphs before the first section
    sections: dict[str, str]


def read(id: str) -> Page:
    head, *parts = re.split(r"^## (.*)$", (DOCS / f"{id}.md").read_text(encoding="utf-8"), flags=re.M)
    title, *opening = re.split(r"\n{2,}", head.strip())
    return Page(title, opening, dict(zip(parts[::2], parts[1::2])))


def rows(section: str) -> list[list[str]]:
    """Cells of the section's tables, without their header rows."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rulers = {n for n, line in enumerate(lines) if set(line) <= set("|- ")}
    return [row for n, row in enumerate(cells) if n not in rulers and n + 1 not in rulers]


def sentences(paragraph: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", paragraph))


@pytest.fixture(params=SCHEMAS)
def id(request):
    return request.param


@pytest.fixture
def page(id):
    return read(id)


def test_pages_and_pictures_match_the_nodes():
    assert {path.stem for path in DOCS.glob("*.md")} == set(SCHEMAS)
    assert {path.name for path in (DOCS / "pictures").iterdir()} == {f"{id}.jpg" for id in SCHEMAS}


def test_sections_are_in_the_common_order(id, page):
    assert page.title == f"# {SCHEMAS[id].display_name}"
    found = list(page.sections)
    assert found == [heading for heading in HEADINGS if heading in found or heading not in OPTIONAL]
    assert all(text.strip() for text in page.sections.values())


def test_page_begins_with_two_sentences_and_a_picture(page):
    summary, picture = page.opening[:2]
    assert sentences(summary) == 2, summary
    assert summary.endswith(".")
    assert IMAGE.fullmatch(picture)


def test_input_rows_match_the_schema(id, page):
    basic, _, advanced = page.sections["Inputs"].partition("\nAdvanced:\n")
    known = [(i.id, bool(getattr(i, "advanced", False))) for i in SCHEMAS[id].inputs]
    remedy = f"give each input of the node one row in web/docs/{id}.md, in the order of the schema"
    assert [row[0] for row in rows(basic)] == [name for name, is_advanced in known if not is_advanced], remedy
    assert [row[0] for row in rows(advanced)] == [name for name, is_advanced in known if is_advanced], remedy
    assert all(len(row) == 3 and row[1] for row in rows(page.sections["Inputs"]))
    assert known or page.sections["Inputs"].strip() == "None."


def test_output_rows_match_the_schema(id, page):
    outputs = SCHEMAS[id].outputs
    assert [row[0] for row in rows(page.sections["Outputs"])] == [o.display_name or o.io_type for o in outputs]
    assert all(len(row) == 2 and row[1] for row in rows(page.sections["Outputs"]))
    assert outputs or page.sections["Outputs"].strip().startswith("None: ")


def test_useful_values_are_within_the_limits(id, page):
    limits = {i.id: (i.min, i.max) for i in SCHEMAS[id].inputs if hasattr(i, "min")}
    for name, _, useful in rows(page.sections["Inputs"]):
        if name in limits:
            low, high = limits[name]
            assert all(low <= float(number) <= high for number in NUMBER.findall(useful)), (name, useful, limits[name])


def test_useful_values_are_not_rounded(id, page):
    """ComfyUI rounds the value of a FLOAT widget to as many decimals as its step has."""
    widgets = {i.id: i for i in SCHEMAS[id].inputs if i.get_io_type() == "FLOAT" and getattr(i, "step", None)}
    useful = {name: [float(n) for n in NUMBER.findall(text)] for name, _, text in rows(page.sections["Inputs"])}
    for name, widget in widgets.items():
        decimals = max(0, -math.floor(math.log10(widget.step)))
        for value in (widget.default, *useful.get(name, ())):
            assert round(value, decimals) == pytest.approx(value), (name, value, widget.step)


def test_options_of_short_lists_are_explained(id, page):
    choices = {i.id: i.options for i in SCHEMAS[id].inputs if 1 < len(getattr(i, "options", None) or []) < 8}
    descriptions = {row[0]: row[1] for row in rows(page.sections["Inputs"])}
    missing = {
        (name, option)
        for name in choices
        for option in choices[name]
        if f"*{option}*" not in descriptions[name] and id[:4] != "Load"
    }
    assert not missing, f"explain the option as *option* in the row of its input in web/docs/{id}.md"


def test_picture_exists_and_is_not_uniform(id):
    ((alt, target),) = IMAGE.findall((DOCS / f"{id}.md").read_text(encoding="utf-8"))
    # a relative path works on GitHub and in ComfyUI's help panel, which prepends the docs folder
    assert target == f"pictures/{id}.jpg"
    assert 40 < len(alt) < 250
    assert not set('"<>') & set(alt)  # ComfyUI writes this text into an HTML attribute without escaping
    file = DOCS / target
    assert file.stat().st_size < MAX_BYTES
    with Image.open(file) as picture:
        assert picture.format == "JPEG"
        assert MIN_SIDE <= picture.width <= MAX_WIDTH
        assert MIN_SIDE <= picture.height <= MAX_HEIGHT
        pixels = picture.convert("RGB").resize((64, 64))
    most_common = max(count for count, _ in pixels.getcolors(64 * 64)) / 64**2
    assert most_common < 0.8  # an empty picture would have only the colour of the background


def test_links_are_https_and_papers_are_known(id):
    text = (DOCS / f"{id}.md").read_text(encoding="utf-8")
    assert not re.findall(r"http://\S+|<a |<img ", text)
    for words, target in LINK.findall(re.sub(r"`[^`]*`", "", text)):
        assert target.startswith("https://"), f"ComfyUI's help panel cannot follow {target!r}; use an https:// link"
        if "arxiv" in target:
            assert ARXIV.fullmatch(target) and words == f"arXiv {target[-10:]}"
    assert set(re.findall(r"\d{4}\.\d{5}", text)) <= known_papers()


@functools.cache
def known_papers() -> set[str]:
    """arXiv numbers in the table of docs/nodes.md or in the module docstrings of the pack."""
    table = [
        line for line in (ROOT / "docs" / "nodes.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    files = [path for folder in ("nodes", "techniques", "training") for path in (ROOT / folder).rglob("*.py")]
    docstrings = [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in files]
    return set(re.findall(r"\d{4}\.\d{5}", "\n".join([*table, *docstrings])))


def test_papers_of_the_table_of_nodes_are_named_on_help_pages():
    lines = (ROOT / "docs" / "nodes.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    papers = {id: row[-1] for row in cells if len(row) == 4 for id in row[0].split(", ") if id in SCHEMAS}
    assert set(papers) == set(SCHEMAS)
    # a row of the table covers several nodes; the nodes that only save files do not implement the paper
    missing = {
        id
        for id, paper in papers.items()
        if re.search(r"\d{4}\.\d{5}", paper) and not id.startswith("Save") and "Paper" not in read(id).sections
    }
    assert not missing


TRANSLATED = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob("*/*.md"))


def test_translations_are_of_nodes_and_in_both_languages():
    found = {tuple(name.removesuffix(".md").split("/")) for name in TRANSLATED}
    ids = {id for id, _ in found}
    assert {"MaskedTokenVideo", "BlendGrid"} <= ids <= set(SCHEMAS)
    assert found == {(id, language) for id in ids for language in ("ja", "zh")}


@pytest.mark.parametrize("name", TRANSLATED)
def test_translation_has_the_structure_of_the_english_page(name):
    """The title is the node's name in the language; sections, rows, code, links and pictures are those of the page."""
    id, language = name.removesuffix(".md").split("/")
    english, page = read(id), read(name.removesuffix(".md"))
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert page.title == f"# {texts[id]['display_name']}"
    assert len(page.sections) == len(english.sections)
    for ours, theirs in zip(page.sections.values(), english.sections.values(), strict=True):
        assert [row[0] for row in rows(ours)] == [row[0] for row in rows(theirs)]
        assert [len(row) for row in rows(ours)] == [len(row) for row in rows(theirs)]
        assert len(re.findall(r"^[-*] ", ours, re.M)) == len(re.findall(r"^[-*] ", theirs, re.M))
        assert set(re.findall(r"`([^`]+)`", theirs)) == set(re.findall(r"`([^`]+)`", ours))
        assert [target for _, target in LINK.findall(ours)] == [target for _, target in LINK.findall(theirs)]
    text, original = ((DOCS / file).read_text(encoding="utf-8") for file in (name, f"{id}.md"))
    assert [target for _, target in IMAGE.findall(text)] == [target for _, target in IMAGE.findall(original)]


def test_server_serves_a_translation_where_the_page_asks_for_it(client):
    file = DOCS / "BlendGrid" / "ja.md"
    assert client.get("/extensions/ComfyUI-Chorus/docs/BlendGrid/ja.md") == file.read_bytes()


def test_server_serves_the_picture(client):
    file = DOCS / "pictures" / "SaliencyNoiseBlend.jpg"
    assert client.get("/extensions/ComfyUI-Chorus/docs/pictures/SaliencyNoiseBlend.jpg") == file.read_bytes()


def test_only_punctuation_before_a_space_ends_a_sentence():
    assert sentences("A file of `a.b` and 1.5. Two?") == 2
    assert sentences("One, by 0.5 and x0. ") == 1
