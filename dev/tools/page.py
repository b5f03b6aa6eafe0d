"""ComfyUI's web page in a headless Chromium: open it, drop a file into it, run its graph, take screenshots."""

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
SLOW = 180_000  # timeout in ms; the page starts in 5 s on a machine that is not busy
RUN = 3_600_000  # timeout of a run in ms; the longest example takes 40 s, and many times as long on a busy machine
REST = 100  # ms between two polls; polling every frame would make the page redraw every frame

PINIA = "document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia"
STORES = f"{PINIA}.state.value"
# the page's errors; newer pages do not keep them in the state of the store
ERRORS = f"{PINIA}._s.get('executionError')"
# True if no overlay covers the page. The functions below wait for this before they continue: if an overlay opened while
# the previous one fades, the page would never remove one of them.
CALM = f"!{STORES}.workspace.spinner && !document.querySelector('.p-blockui-mask')"
READY = f"window.app?.graph && window.app.extensionManager && document.querySelector('[data-testid=queue-button]') && {CALM}"

# Replaces the settings in this page only; the server's user settings do not change. With the settings of a new user,
# the page would show the templates first.
SETTINGS = """
{
  const settings = JSON.stringify(%s), ask = window.fetch;
  window.fetch = (url, ...more) => /[/]api[/]settings([/]|$)/.test(url)
    ? Promise.resolve(new Response(settings, { headers: { 'Content-Type': 'application/json' } })) : ask(url, ...more);
}
"""

# counts the loaded graphs and records how each run ended
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

# dispatches the events that a browser sends when a file is dropped on a part of the canvas without nodes: nodes such as
# LoadImage take a picture that is dropped on them, instead of the graph in it
DROP = """
([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type }));
  const { canvas, ds, graph } = window.app.canvas, { left, top, width, height } = canvas.getBoundingClientRect();
  const parts = [...Array(31).keys()].map(k => (k + 0.5) / 31);
  const empty = parts.flatMap(x => parts.map(y => [x * width, y * height]))
    .find(([x, y]) => !graph.getNodeOnPos(x / ds.scale - ds.offset[0], y / ds.scale - ds.offset[1]));
  if (!empty) throw new Error('nodes cover the whole canvas');
  const event = { bubbles: true, cancelable: true, composed: true, dataTransfer,
                  clientX: left + empty[0], clientY: top + empty[1] };
  for (const kind of ['dragenter', 'dragover', 'drop']) canvas.dispatchEvent(new DragEvent(kind, event));
}
"""

# fits the whole graph or some nodes into a part of the page, ignoring the page's zoom limits; returns the covered part
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

# returns the nodes whose images or texts from the last run are not yet shown by the page
UNSEEN = """
() => window.app.graph._nodes.filter(node => {
  const { images = [], text = [] } = window.app.nodeOutputs[node.id] ?? {}, shown = node.imgs ?? [];
  const complete = images.length <= shown.length && shown.every(image => image.complete && image.naturalWidth);
  return !complete || !text.every(words => node.widgets.some(widget => String(widget.value).includes(words)));
}).map(node => `${node.id} ${node.type}`)
"""

# the server's errors if it rejected any part of the graph after a click on Run
REFUSED = f"""
() => {{
  const {{ lastNodeErrors, lastPromptError }} = {ERRORS};
  return Object.keys(lastNodeErrors ?? {{}}).length ? lastNodeErrors : lastPromptError;
}}
"""


def find_chromium() -> str | None:
    """The browser's program: $CHORUS_CHROMIUM, else the first name in CHROMIUM that is on the path, else None."""
    names = filter(None, [os.environ.get("CHORUS_CHROMIUM"), *CHROMIUM])
    return next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def chromium(path: str) -> Iterator:
    """A Playwright browser."""
    from playwright.sync_api import sync_playwright

    # no sandbox, because it does not work as root or in some containers; the page comes from our own server
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser, address: str, language="en", width=1600, height=1000, on_new=lambda page: None, settings=None):
    """Open the page of the server at ``address`` with default settings in ``language``, and wait until it is ready.

    ``on_new(page)`` is called before the page loads, to add listeners. ``settings``: values of further settings by id.
    """
    context = browser.new_context(viewport={"width": width, "height": height}, locale="en-US")
    settings = {"Comfy.Locale": language, "Comfy.TutorialCompleted": True, **(settings or {})}
    context.add_init_script(SETTINGS % json.dumps(settings))
    page = context.new_page()
    page.set_default_timeout(SLOW)
    on_new(page)
    page.goto(f"http://{address}", wait_until="domcontentloaded")
    page.wait_for_function(f"() => {READY}", polling=REST)
    page.evaluate(WATCH)
    return page


def loads(page) -> int:
    """The number of graphs that the page has loaded since it was opened."""
    return page.evaluate("() => window.chorus.loads")


def wait_for_load(page, before: int) -> None:
    """Wait until the page has loaded more than ``before`` graphs and shows no overlay."""
    page.wait_for_function(f"before => window.chorus.loads > before && {CALM}", arg=before, polling=REST)


def drop(page, file: Path | str, content: bytes) -> None:
    """Drop a file onto the canvas, beside its nodes, and wait until its graph is loaded."""
    file, before = Path(file), loads(page)
    page.evaluate(DROP, [file.name, TYPES[file.suffix], base64.b64encode(content).decode()])
    wait_for_load(page, before)
    if file.suffix == ".json":  # the load that was counted may be a late one of an earlier graph
        nodes = sorted(f"{node['id']} {node['type']}" for node in json.loads(content)["nodes"])
        page.wait_for_function(
            "nodes => window.app.graph._nodes.map(({ id, type }) => `${id} ${type}`).sort().join() === nodes.join()",
            arg=nodes,
            polling=REST,
        )


def run(page) -> dict:
    """Press Run and wait for the end: {"end": "execution_success", "prompt_id": ...} on success.

    The server also runs the valid parts of an invalid graph. If any part is invalid, "end" is "refused" and "errors"
    has the errors by node. Call ``place`` first: the page fetches images only for the nodes that it draws.
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
    """Fit the whole graph, or the nodes with the ids ``nodes``, into this part of the page; returns the covered
    part."""
    return page.evaluate(PLACE, {"x": x, "y": y, "width": width, "height": height, "nodes": list(nodes)})
