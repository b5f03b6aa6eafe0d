"""The website of the documentation: links are adapted, problems are found, and the real one is built without any."""

import subprocess
import sys

import pytest

from chorus.dev.tools import docs_site, links, setup

OWN, TREE, RAW = links.own_addresses()
SITE = {"README.md", "docs/nodes.md", "docs/memory.md", "example_workflows/Plain blend.jpg"}


def test_only_links_outside_code_are_rewritten():
    text = f'[a](x.md#b) `[b](y.md)` ![c]({RAW}z.png) <a href="w">\n```\n[d](v.md)\n```\n'
    assert links.rewrite(text, lambda link: "1") == '[a](1) `[b](y.md)` ![c](1) <a href="1">\n```\n[d](v.md)\n```\n'
    assert links.targets(text) == ["x.md#b", f"{RAW}z.png", "w"]


@pytest.mark.parametrize(
    ("link", "address"),
    [
        ("memory.md#models-computed", "memory.md#models-computed"),
        (f"{OWN}README.md#install", "../README.md#install"),
        (f"{OWN}docs/nodes.md#the-nodes", "#the-nodes"),
        ("../example_workflows/Plain%20blend.jpg", "../example_workflows/Plain%20blend.jpg"),
        ("../techniques/", f"{TREE}techniques"),
        ("../tests/dev/test_run.py", f"{OWN}tests/dev/test_run.py"),
        ("../dev/recipes/README.md#stages", f"{OWN}dev/recipes/README.md#stages"),
        ("https://arxiv.org/abs/2303.13126", "https://arxiv.org/abs/2303.13126"),
    ],
)
def test_links_to_pages_of_the_website_stay_on_it(link, address):
    assert docs_site.address(link, "docs/nodes.md", SITE) == address


@pytest.fixture
def problems(tmp_path):
    """A function that writes the page SECURITY.html of a website and returns its problems."""

    def find(body: str, anchors=()) -> list[str]:
        anchors = anchors or links.anchors(setup.ROOT / "SECURITY.md")
        headings = "".join(f'<h2 id="{anchor}"></h2>' for anchor in anchors)
        (tmp_path / "SECURITY.html").write_text(f"<html>{headings}{body}</html>")
        (tmp_path / "a b.png").touch()
        return docs_site.problems(tmp_path)

    return find


def test_good_page_has_no_problems(problems):
    body = (
        '<a href="#x" id="x"></a><a href="SECURITY.html#x"></a><img src="a%20b.png"><a href="https://example.org/"></a>'
    )
    assert not problems(body)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="no.html">', "links to no.html"),
        ('<a href="#no">', "links to #no"),
        ('<img src="no.png">', "links to no.png"),
        ('<link rel="stylesheet" href="no.css">', "links to no.css"),
        ('<script src="https://example.org/x.js">', "loads https://example.org/x.js"),
    ],
)
def test_problems_of_a_page_are_found(problems, body, problem):
    assert problems(body) == [f"SECURITY.html {problem}"]


def test_heading_with_another_anchor_than_on_github_is_found(problems):
    assert problems("", anchors=["Security"]) == ["SECURITY.html has no anchor security, as GitHub has"]


def test_website_has_the_address_of_the_repository():
    text = docs_site.CONFIG.read_text(encoding="utf-8")
    owner, name = links.repository().removeprefix("https://github.com/").split("/")
    assert f"site_url: https://{owner}.github.io/{name}/\n" in text and f"link: {links.repository()}\n" in text


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="mkdocs-material needs Python 3.11")
def test_website_is_built_without_problems(tmp_path):
    host = setup.Host(setup.ROOT, setup.docs_python(), None)
    command = setup.module(host, "chorus.dev.tools.docs_site", str(tmp_path / "site"))
    done = subprocess.run(command, cwd=setup.ROOT, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [page for pattern in ("docs/*.md", "web/docs/*.md") for page in setup.ROOT.glob(pattern)]
    built = {page.relative_to(tmp_path / "site") for page in (tmp_path / "site").rglob("*.html")}
    assert {page.relative_to(setup.ROOT).with_suffix(".html") for page in pages} < built
