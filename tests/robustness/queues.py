"""A client that queues many runs at once, disconnects abruptly, or sends arbitrary data."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from chorus.dev.tools.client import Comfy, WorkflowError, refusal
from chorus.dev.tools.server import urlopen_no_proxy


@dataclass
class PromptResult:
    """How a prompt ended: it was rejected, its run failed, or its run succeeded."""

    status: int  # HTTP status
    message: str = ""  # error message of the rejection or of the failed node
    error: dict | None = None  # data of ComfyUI's event execution_error

    @property
    def outcome(self) -> str:
        return "refused" if self.status != 200 else "failed" if self.error else "done"


class Client(Comfy):
    def send(self, body: bytes, path: str = "/prompt") -> tuple[int, str]:
        """Post ``body``. Returns the status and the text of the response."""
        request = urllib.request.Request(f"http://{self.address}{path}", body, {"Content-Type": "application/json"})
        try:
            with urlopen_no_proxy(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def attempt(self, prompt, timeout: float = 300) -> PromptResult:
        """Queue ``prompt``, valid or not, and wait for its end."""
        status, text = self.send(json.dumps({"prompt": prompt, "client_id": self.id}).encode())
        if status != 200:
            return PromptResult(status, refusal(text))
        failed = []

        def record(kind, data):
            if kind == "execution_error":
                failed.append(data)

        try:
            self.follow(json.loads(text)["prompt_id"], record, timeout)
        except WorkflowError as error:
            if not failed:
                raise
            return PromptResult(status, str(error), failed[0])
        return PromptResult(status)

    def queue(self, prompt: dict) -> str:
        """Queue ``prompt`` and return its id without waiting."""
        return self._queue(prompt, {"extra_data": {"preview_method": "latent2rgb"}})

    def follow(self, prompt_id: str, on_event=None, timeout: float = 600):
        """Wait for the end of a queued prompt."""
        return self._loop.run_until_complete(self._follow(prompt_id, on_event, timeout))

    def disconnect(self) -> None:
        """Abort the connection without a closing handshake, as a closed laptop does."""
        self._socket._response.connection.transport.abort()
        self._loop.run_until_complete(self._session.close())
        self._loop.close()


def log_since(log: Path, place: int) -> str:
    with open(log, "rb") as file:
        file.seek(place)
        return file.read().decode(errors="replace")
