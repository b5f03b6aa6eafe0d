"""A client of a running ComfyUI. Like the web page, it queues a workflow, follows its progress and fetches its
images."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from .server import urlopen_no_proxy

ENDS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}


def needs(workflow: dict) -> list[str]:
    """Files that a workflow (in UI format) needs but the pack does not contain, relative to ComfyUI's folder."""
    return workflow.get("extra", {}).get("chorus", {}).get("needs", [])


class WorkflowError(Exception):
    """ComfyUI rejected a workflow, or one of its nodes failed; the message names the node."""


@dataclass
class Result:
    status: str = ""  # success or interrupted
    seconds: float = 0.0
    outputs: dict = field(default_factory=dict)  # node id -> its ui output: images, text, ...
    events: list[tuple[str, dict]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)

    def cached(self) -> set[str]:
        """Ids of the nodes whose outputs came from the cache."""
        return {node for kind, data in self.events if kind == "execution_cached" for node in data["nodes"]}


class Comfy:
    """A client of one server; use it as a context manager."""

    def __init__(self, address: str):
        self.address, self.id = address, uuid.uuid4().hex
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._connect())

    async def _connect(self):
        self._session = aiohttp.ClientSession()
        url = f"http://{self.address}/ws?clientId={self.id}"
        self._socket = await self._session.ws_connect(url, max_msg_size=0)

    def close(self):
        self._loop.run_until_complete(self._socket.close())
        self._loop.run_until_complete(self._session.close())
        self._loop.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def get(self, path: str) -> bytes:
        with urlopen_no_proxy(f"http://{self.address}{path}", timeout=120) as response:
            return response.read()

    def get_json(self, path: str):
        return json.loads(self.get(path))

    def post(self, path: str, content: dict | None = None) -> dict:
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(content or {}).encode(), {"Content-Type": "application/json"}
        )
        with urlopen_no_proxy(request, timeout=120) as response:
            return json.loads(response.read() or b"{}")

    def interrupt(self):
        self.post("/interrupt")

    def free(self):
        """Unload all models and clear all cached outputs.

        The server frees memory only between two runs. The small run ensures that this happens before the next prompt
        starts.
        """
        self.post("/free", {"unload_models": True, "free_memory": True})
        self.run({"done": {"class_type": "PreviewAny", "inputs": {"source": uuid.uuid4().hex}}})

    def to_api(self, workflow: dict) -> dict:
        """Convert a workflow from the UI format, as the page saves it, to the API format, which can be queued."""
        return self.all_to_api([workflow])[0]

    def all_to_api(self, workflows: list[dict]) -> list[dict]:
        """Convert several workflows in one process."""
        # comfy-cli is under the GPL, so it runs in a separate process. It writes a configuration to the home folder,
        # which is therefore a temporary one.
        code = (
            "import json, sys; from comfy_cli.workflow_to_api import convert_ui_to_api\n"
            "workflows, info = json.load(sys.stdin)\n"
            "json.dump([convert_ui_to_api(workflow, info) for workflow in workflows], sys.stdout)"
        )
        with tempfile.TemporaryDirectory() as home:
            result = subprocess.run(
                [sys.executable, "-c", code],
                input=json.dumps([workflows, self.get_json("/object_info")]),
                capture_output=True,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": home, "USERPROFILE": home},
            )
        if result.returncode:
            raise WorkflowError(f"cannot convert to the API format: {result.stderr.strip().splitlines()[-1]}")
        return json.loads(result.stdout)

    def run(self, prompt: dict, on_event: Callable | None = None, timeout: float = 600, **extra) -> Result:
        """Queue a workflow in API format and wait for its end. ``on_event(kind, data)`` may call interrupt()."""
        start = time.monotonic()
        result = self._loop.run_until_complete(self._follow(self._queue(prompt, extra), on_event, timeout))
        result.seconds = time.monotonic() - start
        return result

    def _queue(self, prompt: dict, extra: dict) -> str:
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.id, **extra})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise WorkflowError(refusal(error.read().decode(errors="replace"))) from None

    async def _follow(self, prompt_id: str, on_event: Callable | None, timeout: float) -> Result:
        result, deadline = Result(), time.monotonic() + timeout
        while not result.status:
            try:
                message = await self._socket.receive(timeout=max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise TimeoutError(f"prompt {prompt_id} did not end within {timeout} s") from None
            if message.type is aiohttp.WSMsgType.BINARY:
                if struct.unpack(">I", message.data[:4])[0] in (
                    1,
                    4,
                ):  # a preview image, without (1) or with (4) metadata
                    result.previews.append(message.data)
                continue
            if message.type is not aiohttp.WSMsgType.TEXT:
                raise WorkflowError(f"the server closed the connection while it ran prompt {prompt_id}; see its log")
            content = json.loads(message.data)
            kind, data = content["type"], content["data"]
            if data.get("prompt_id") not in (None, prompt_id):
                continue
            result.events.append((kind, data))
            if on_event:
                on_event(kind, data)
            if kind == "execution_error":
                raise WorkflowError(
                    f"node {data['node_id']} ({data['node_type']}): {data['exception_type']}: {data['exception_message']}"
                )
            result.status = ENDS.get(kind, "")
        while not (entry := self.get_json(f"/history/{prompt_id}").get(prompt_id)):
            await asyncio.sleep(0.05)  # the history entry is written after the last event
        result.outputs = entry["outputs"]
        return result

    def images(self, result: Result, kind: str = "output") -> list[tuple[str, str, bytes]]:
        """(node id, file name, content of the file) of all saved images, or with kind='temp' of all preview images."""
        return [
            (node, image["filename"], self.get("/view?" + urllib.parse.urlencode(image)))
            for node, output in result.outputs.items()
            for image in output.get("images", [])
            if image.get("type") == kind
        ]


def refusal(body: str) -> str:
    """The server's response to an invalid workflow as text: one line for each node error."""
    try:
        response = json.loads(body)
        lines = [
            f"node {node} ({errors['class_type']}): {error['message']}: {error['details']}"
            for node, errors in (response.get("node_errors") or {}).items()
            for error in errors["errors"]
        ]
        return "\n".join(lines) or response["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:500]
