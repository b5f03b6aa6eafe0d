"""ComfyUI's own web page in a Chromium without a window: open it, give it a file, run what it shows, look at it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
TYPES = {".json": "application/json", ".png": "image/png"}
SLOW = 180_000  # ms; the page starts in 5 s on a machine that is not busy
RUN = 3_600_000  # ms; the longest example takes 40 s on such a machine, many times that on a crowded one
REST = 100  # ms between two looks; looking at every frame makes the page draw every frame

STORES = "document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia.state.value"
# no veil upon the page; one that comes before the last has faded makes the page forget one of them for ever
CALM = f"!{STORES}.workspace.spinner && !document.querySelector('.p-blockui-mask')"
READY = f"window.app?.graph && window.app.extensionManager && document.querySelector('[data-testid=queue-button]') && {CALM}"

# settings of this page alone, so that the server keeps its user's; a new user would be shown the templates first
SETTINGS = """
{
  const settings = JSON.stringify(%s), ask = window.fetch;
  window.fetch = (url, ...more) => /[/]api[/]settings([/]|$)/.test(url)
    ? Promise.resolve(new Response(settings, { headers: { 'Content-Type': 'application/json' } })) : ask(url, ...more);
}
"""

# counts the graphs that were loaded, and keeps what the server says of the runs
WATCH = """
() => {
  window.chorus = { loads: 0, missing: [], ends: [] };
  window.app.registerExtension({
    name: 'chorus.watch',
    afterConfigureGraph(missing) { window.chorus.loads += 1; window.chorus.missing = missing.map(m => m.type ?? m); },
  });
  for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
    window.app.api.addEventListener(end, event => window.chorus.ends.push({ end, ...event.detail }));
}
"""

# what the browser sends when a person drops a file in the middle of the canvas
DROP = """
([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type }));
  const canvas = window.app.canvas.canvas, { left, top, width, height } = canvas.getBoundingClientRect();
  const event = { bubbles: true, cancelable: true, composed: true, dataTransfer,
                  clientX: left + width / 2, clientY: top + height / 2 };
  for (const kind of ['dragenter', 'dragover', 'drop']) canvas.dispatchEvent(new DragEvent(kind, event));
}
"""

# brings the whole graph or some nodes into a part of the page, without the page's limits of zoom; returns where they are then
PLACE = """
async ({ x, y, width, height, nodes }) => {
  const { graph, canvas } = window.app, page = canvas.canvas.getBoundingClientRect();
  const placed = graph._nodes.filter(node => !nodes.length || nodes.includes(Number(node.id)));
  const ends = placed.map(({ pos, size }) => [pos[0], pos[1] - 60, pos[0] + size[0], pos[1] + size[1]]);
  const [left, top] = [0, 1].map(k => Math.min(...ends.map(end => end[k])) - 20);
  const [right, bottom] = [2, 3].map(k => Math.max(...ends.map(end => end[k])) + 20);
  const scale = Math.min(width / (right - left), height / (bottom - top));
  canvas.ds.scale = scale;
  canvas.ds.offset = [(x - page.left) / scale - left, (y - page.top) / scale - top];
  canvas.deselectAll();
  for (let frame = 0; frame < 3; frame++) {
    canvas.setDirty(true, true);
    await new Promise(done => requestAnimationFrame(done));
  }
  return { x, y, width: (right - left) * scale, height: (bottom - top) * scale };
}
"""

# nodes of which the last run has pictures or texts that the page does not show yet
UNSEEN = """
() => window.app.graph._nodes.filter(node => {
  const { images = [], text = [] } = window.app.nodeOutputs[node.id] ?? {}, shown = node.imgs ?? [];
  const pictures = images.length <= shown.length && shown.every(image => image.complete && image.naturalWidth);
  return !pictures || !text.every(words => node.widgets.some(widget => String(widget.value).includes(words)));
}).map(node => `${node.id} ${node.type}`)
"""

# what the server answered to Run, if it did not take all of the graph
REFUSED = f"""
() => {{
  const {{ lastNodeErrors, lastPromptError }} = {STORES}.executionError;
  return Object.keys(lastNodeErrors ?? {{}}).length ? lastNodeErrors : lastPromptError;
}}
"""


def find_chromium() -> str | None:
    """$CHORUS_CHROMIUM, else the first of CHROMIUM on the path."""
    names = filter(None, [os.environ.get("CHORUS_CHROMIUM"), *CHROMIUM])
    return next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def chromium(path: str) -> Iterator:
    """A Playwright browser."""
    from playwright.sync_api import sync_playwright

    # no sandbox: root has none, and a container may forbid it; the page comes from our own server
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser, address: str, language="en", width=1600, height=1000, on_new=lambda page: None):
    """The page of the server at ``address``, ready for a workflow, as a user has it who changed no setting but the language.

    ``on_new(page)`` may listen to it from its first moment.
    """
    context = browser.new_context(viewport={"width": width, "height": height}, locale="en-US")
    context.add_init_script(SETTINGS % json.dumps({"Comfy.Locale": language, "Comfy.TutorialCompleted": True}))
    page = context.new_page()
    page.set_default_timeout(SLOW)
    on_new(page)
    page.goto(f"http://{address}", wait_until="domcontentloaded")
    page.wait_for_function(f"() => {READY}", polling=REST)
    page.evaluate(WATCH)
    return page


def loads(page) -> int:
    """How many graphs the page loaded since it was opened."""
    return page.evaluate("() => window.chorus.loads")


def wait_for_load(page, before: int) -> None:
    """Wait for a graph after the ``before``-th, until the page is at rest again."""
    page.wait_for_function(f"before => window.chorus.loads > before && {CALM}", arg=before, polling=REST)


def drop(page, file: Path | str, content: bytes) -> None:
    """Drop a file onto the canvas and wait until its graph is there."""
    file, before = Path(file), loads(page)
    page.evaluate(DROP, [file.name, TYPES[file.suffix], base64.b64encode(content).decode()])
    wait_for_load(page, before)


def run(page) -> dict:
    """Press Run and wait for the end: {"end": "execution_success", "prompt_id": ...} if all went well.

    The server runs what is right of a graph: "refused" if any of it is not, with its errors by node. The graph must be in
    sight (``place``): the page fetches the pictures of nodes that it draws.
    """
    before = page.evaluate("() => window.chorus.ends.length")
    page.get_by_test_id("queue-button").click()
    ended = f"before => window.chorus.ends.length > before || ({REFUSED})()"
    page.wait_for_function(ended, arg=before, polling=REST, timeout=RUN)
    if refused := page.evaluate(REFUSED):
        return {"end": "refused", "errors": refused}
    end = page.evaluate("() => window.chorus.ends.at(-1)")
    if end["end"] == "execution_success":
        page.wait_for_function(
            f"() => {{ window.app.canvas.setDirty(true, true); return !({UNSEEN})().length }}", polling=REST
        )
    return end


def place(page, x: float = 80, y: float = 120, width: float = 1440, height: float = 720, nodes=()) -> dict:
    """Bring the whole graph, or the nodes of these ids, into this part of the page; returns the part that is covered."""
    return page.evaluate(PLACE, {"x": x, "y": y, "width": width, "height": height, "nodes": list(nodes)})
