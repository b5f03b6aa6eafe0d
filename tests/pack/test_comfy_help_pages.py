"""Every node has a help page, and each says what its node's schema says, in the same order, beside a picture."""

import ast
import functools
import re
from typing import NamedTuple

import pytest
from PIL import Image

from chorus import nodes
from chorus.dev.tools.setup import ROOT

DOCS = ROOT / "web" / "docs"
SCHEMAS = {schema.node_id: schema for schema in (node.define_schema() for node in nodes.NODES)}
HEADINGS = ["Inputs", "Outputs", "Cost", "Try first", "Good to know", "Paper"]
OPTIONAL = {"Good to know", "Paper"}
LEAST, WIDEST, HIGHEST, BYTES = 200, 900, 1000, 120_000
IMAGE = re.compile(r"!\[(.*?)\]\((.*?)\)", re.S)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((.*?)\)", re.S)
ARXIV = re.compile(r"https://arxiv\.org/abs/(\d{4}\.\d{5})")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?")


class Page(NamedTuple):
    title: str
    opening: list[str]  # its paragraphs
    sections: dict[str, str]


def read(id: str) -> Page:
    head, *parts = re.split(r"^## (.*)$", (DOCS / f"{id}.md").read_text(encoding="utf-8"), flags=re.M)
    title, *opening = re.split(r"\n{2,}", head.strip())
    return Page(title, opening, dict(zip(parts[::2], parts[1::2])))


def rows(section: str) -> list[list[str]]:
    """The cells of its tables, without their heads."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    heads = {n for n, line in enumerate(lines) if set(line) <= set("|- ")}
    return [row for n, row in enumerate(cells) if n not in heads and n + 1 not in heads]


def sentences(paragraph: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", paragraph))


@pytest.fixture(params=SCHEMAS)
def id(request):
    return request.param


@pytest.fixture
def page(id):
    return read(id)


def test_each_node_has_a_page_and_a_picture_and_no_other_is_left():
    assert {path.stem for path in DOCS.glob("*.md")} == set(SCHEMAS)
    assert {path.name for path in (DOCS / "pictures").iterdir()} == {f"{id}.jpg" for id in SCHEMAS}


def test_it_has_the_same_parts_in_the_same_order(id, page):
    assert page.title == f"# {SCHEMAS[id].display_name}"
    found = list(page.sections)
    assert found == [heading for heading in HEADINGS if heading in found or heading not in OPTIONAL]
    assert all(text.strip() for text in page.sections.values())


def test_it_begins_with_two_sentences_and_a_picture(page):
    what, picture = page.opening[:2]
    assert sentences(what) == 2, what
    assert what.endswith(".")
    assert IMAGE.fullmatch(picture)


def test_every_input_has_its_row_and_no_other(id, page):
    everyday, _, advanced = page.sections["Inputs"].partition("\nAdvanced:\n")
    known = [(i.id, bool(getattr(i, "advanced", False))) for i in SCHEMAS[id].inputs]
    assert [row[0] for row in rows(everyday)] == [name for name, is_advanced in known if not is_advanced]
    assert [row[0] for row in rows(advanced)] == [name for name, is_advanced in known if is_advanced]
    assert all(len(row) == 3 and row[1] for row in rows(page.sections["Inputs"]))
    assert known or page.sections["Inputs"].strip() == "None."


def test_every_output_has_its_row_and_no_other(id, page):
    outputs = SCHEMAS[id].outputs
    assert [row[0] for row in rows(page.sections["Outputs"])] == [o.display_name or o.io_type for o in outputs]
    assert all(len(row) == 2 and row[1] for row in rows(page.sections["Outputs"]))
    assert outputs or page.sections["Outputs"].strip().startswith("None: ")


def test_what_it_calls_useful_can_be_set(id, page):
    limits = {i.id: (i.min, i.max) for i in SCHEMAS[id].inputs if hasattr(i, "min")}
    for name, _, useful in rows(page.sections["Inputs"]):
        if name in limits:
            low, high = limits[name]
            assert all(low <= float(number) <= high for number in NUMBER.findall(useful)), (name, useful, limits[name])


def test_the_options_of_a_short_list_are_all_explained(id, page):
    choices = {i.id: i.options for i in SCHEMAS[id].inputs if 1 < len(getattr(i, "options", None) or []) < 8}
    said = {row[0]: row[1] for row in rows(page.sections["Inputs"])}
    missing = {
        (name, option)
        for name in choices
        for option in choices[name]
        if f"*{option}*" not in said[name] and id[:4] != "Load"
    }
    assert not missing


def test_the_picture_is_there_and_shows_something(id):
    ((said, target),) = IMAGE.findall((DOCS / f"{id}.md").read_text(encoding="utf-8"))
    # relative to the page: so both the page's help, which puts its own folder before it, and GitHub find it
    assert target == f"pictures/{id}.jpg"
    assert 40 < len(said) < 250
    assert not set('"<>') & set(said)  # the page writes it into an attribute as it is
    file = DOCS / target
    assert file.stat().st_size < BYTES
    with Image.open(file) as picture:
        assert picture.format == "JPEG"
        assert LEAST <= picture.width <= WIDEST
        assert LEAST <= picture.height <= HIGHEST
        seen = picture.convert("RGB").resize((64, 64))
    share = max(count for count, _ in seen.getcolors(64 * 64)) / 64**2
    assert share < 0.8  # the sheet itself is dark; what lies on it is not


def test_links_lead_somewhere(id):
    text = (DOCS / f"{id}.md").read_text(encoding="utf-8")
    assert not re.findall(r"http://\S+|<a |<img ", text)
    for words, target in LINK.findall(re.sub(r"`[^`]*`", "", text)):
        assert target.startswith("https://"), f"the page cannot follow {target!r} from here"
        if "arxiv" in target:
            assert ARXIV.fullmatch(target) and words == f"arXiv {target[-10:]}"
    assert set(re.findall(r"\d{4}\.\d{5}", text)) <= known_papers()


@functools.cache
def known_papers() -> set[str]:
    """The numbers that stand in the README's table of nodes or open a module of the pack."""
    table = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    files = [path for folder in ("nodes", "techniques", "training") for path in (ROOT / folder).rglob("*.py")]
    openings = [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in files]
    return set(re.findall(r"\d{4}\.\d{5}", "\n".join([*table, *openings])))


def test_a_node_with_a_paper_in_the_readme_names_it():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    of = {id: row[-1] for row in cells if len(row) == 4 for id in row[0].split(", ") if id in SCHEMAS}
    assert set(of) == set(SCHEMAS)
    # a row is of several nodes: those that only save have nothing of the paper
    silent = {
        id
        for id, paper in of.items()
        if re.search(r"\d{4}\.\d{5}", paper) and not id.startswith("Save") and "Paper" not in read(id).sections
    }
    assert not silent


def test_the_server_gives_the_picture(comfy):
    file = DOCS / "pictures" / "SaliencyNoiseBlend.jpg"
    assert comfy.get("/extensions/ComfyUI-Chorus/docs/pictures/SaliencyNoiseBlend.jpg") == file.read_bytes()


def test_sentences_are_counted():
    assert sentences("A file of `a.b` and 1.5. Two?") == 2
    assert sentences("One, by 0.5 and x0. ") == 1
