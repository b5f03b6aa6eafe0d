"""Fixtures for ComfyUI's web page in a headless Chromium, with one real server. Without Chromium, tests are skipped."""

import re

import pytest
from PIL import Image

from chorus.dev.tools import page as page_tools
from chorus.dev.tools.client import Comfy
from chorus.tests.support.real_comfyui import server  # noqa: F401 (fixture)

# patterns of the errors (message and address) that the page logs in every fresh ComfyUI, each with its cause
HARMLESS = [
    r"404 .*/user\.css$",  # no style sheet of the user
    r"404 .*/userdata/(user\.css|comfy\.templates\.json)$",  # no templates of the user
    r"404 .*/userdata\?dir=(workflows|subgraphs)&",  # no saved workflows yet
    r"404 .*/templates/",  # pictures of ComfyUI's templates, an optional package
    r"404 .*/docs/\w+/\w+\.md$",  # the page looks for help in its language first
    r"^ComfyApp graph accessed before initialization",
    # the page requests the sizes of models that a workflow offers to download, but its security policy forbids this
    r"(^Connecting to|^Fetch API cannot load) '?https://huggingface\.co/.*Content Security Policy",
]


def pytest_collection_modifyitems(items):
    """Run the browser tests last: Playwright keeps its event loop running in this thread."""
    items.sort(key=lambda item: "browser" in item.path.relative_to(item.config.rootpath).parts)


class Reader(Comfy):
    """A client without an event loop, which can make requests but cannot follow runs."""

    def __init__(self, address: str):
        self.address = address


@pytest.fixture
def client(server):  # noqa: F811
    """Client with get(path), get_json(path), to_api(workflow)."""
    return Reader(server.address)


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright", reason="needs Playwright; `python run.py test` installs it")
    path = page_tools.find_chromium()
    if not path:
        pytest.skip(f"needs Chromium: put one of {', '.join(page_tools.CHROMIUM)} on the path or set CHORUS_CHROMIUM")
    with page_tools.chromium(path) as started:
        yield started


@pytest.fixture(scope="session")
def page_errors():
    """Console errors and script exceptions of the page since the last test."""
    return []


@pytest.fixture(scope="session")
def open_page(server, browser, page_errors):  # noqa: F811
    """Function open_page(language, settings) that opens ComfyUI in that language, ready for a workflow.

    ``settings``: values of further settings of the page, by id.
    """

    def listen(page):
        page.on("pageerror", lambda error: page_errors.append(f"exception: {error}"))
        page.on("console", lambda message: message.type == "error" and page_errors.append(error_text(message)))

    # ComfyUI's input folder has an image of this name
    Image.linear_gradient("L").convert("RGB").save(server.base / "input" / "example.png")
    return lambda language, settings=None: page_tools.open_page(
        browser, server.address, language, on_new=listen, settings=settings
    )


@pytest.fixture(scope="module")
def page(open_page):
    """One English page for all tests of a module, because users also open several workflows in one page."""
    opened = open_page("en")
    yield opened
    opened.context.close()


@pytest.fixture(autouse=True)
def no_page_errors(page_errors):
    yield
    found, page_errors[:] = [text for text in page_errors if not any(re.search(known, text) for known in HARMLESS)], []
    assert not found, "errors of the page:\n" + "\n".join(found)


def error_text(message) -> str:
    """Text of a console message. For a 404, it is the address."""
    if "status of 404" in message.text:
        return f"404 {message.location['url']}"
    return message.text
