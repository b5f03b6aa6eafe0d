"""ComfyUI's own web page, in a Chromium without a window, on one real server; whoever has no Chromium skips these tests."""

import re

import pytest
from PIL import Image

from chorus.dev.tools import page as page_tools
from chorus.dev.tools.client import Comfy
from chorus.tests.support.real_comfyui import server  # noqa: F401 (fixture)

# what the page itself complains of on every fresh ComfyUI, by message and address, and why
HARMLESS = [
    r"404 .*/user\.css$",  # a style sheet of the user's own
    r"404 .*/userdata/(user\.css|comfy\.templates\.json)$",  # no templates of the user's own either
    r"404 .*/userdata\?dir=(workflows|subgraphs)&",  # nothing was saved yet
    r"404 .*/templates/",  # pictures of the host's own templates, a package that a ComfyUI may lack
    r"404 .*/docs/\w+/\w+\.md$",  # the help is asked for in the page's language before the plain one
    r"^ComfyApp graph accessed before initialization",
    # the page asks how large the files are that a workflow (the host's default one too) offers to load, and may not
    r"(^Connecting to|^Fetch API cannot load) '?https://huggingface\.co/.*Content Security Policy",
]


def pytest_collection_modifyitems(items):
    """Last of all: from here on Playwright's event loop is the one of this thread."""
    items.sort(key=lambda item: "browser" in item.path.relative_to(item.config.rootpath).parts)


class Reader(Comfy):
    """A client that asks without following runs: it has no event loop of its own."""

    def __init__(self, address: str):
        self.address = address


@pytest.fixture
def comfy(server):  # noqa: F811
    """get(path), get_json(path), to_api(workflow)."""
    return Reader(server.address)


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright", reason="Playwright drives the page; `python run.py test` brings it")
    path = page_tools.find_chromium()
    if not path:
        pytest.skip(f"none of {', '.join(page_tools.CHROMIUM)} is on the path and CHORUS_CHROMIUM names none")
    with page_tools.chromium(path) as started:
        yield started


@pytest.fixture(scope="session")
def complaints():
    """Errors in the console of a page and exceptions in its scripts, since the last test."""
    return []


@pytest.fixture(scope="session")
def open_page(server, browser, complaints):  # noqa: F811
    """open_page(language): the page, ready for a workflow."""

    def listen(page):
        page.on("pageerror", lambda error: complaints.append(f"exception: {error}"))
        page.on("console", lambda said: said.type == "error" and complaints.append(described(said)))

    Image.linear_gradient("L").convert("RGB").save(server.base / "input" / "example.png")  # as in the host's own input/
    return lambda language: page_tools.open_page(browser, server.address, language, on_new=listen)


@pytest.fixture(scope="module")
def page(open_page):
    """One page in English for all tests of a file: people too open one workflow after the other."""
    opened = open_page("en")
    yield opened
    opened.context.close()


@pytest.fixture(autouse=True)
def no_complaints(complaints):
    yield
    found, complaints[:] = [said for said in complaints if not any(re.search(known, said) for known in HARMLESS)], []
    assert not found, "the page says:\n" + "\n".join(found)


def described(said) -> str:
    """A console message; one of a file that was not found names the file."""
    if "status of 404" in said.text:
        return f"404 {said.location['url']}"
    return said.text
