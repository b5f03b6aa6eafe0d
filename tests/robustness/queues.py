"""Clients of a server that queue many runs at once, vanish, or send anything."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from chorus.dev.tools.client import Comfy, WorkflowError, refusal
from chorus.dev.tools.server import open_local


@dataclass
class Answer:
    """What became of a prompt."""

    status: int  # of HTTP
    message: str = ""  # of its refusal or of the node that failed
    error: dict | None = None  # what execution_error said

    @property
    def what(self) -> str:
        return "refused" if self.status != 200 else "failed" if self.error else "done"


class Client(Comfy):
    def send(self, body: bytes, path: str = "/prompt") -> tuple[int, str]:
        """Status and answer of whatever is posted."""
        request = urllib.request.Request(f"http://{self.address}{path}", body, {"Content-Type": "application/json"})
        try:
            with open_local(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def attempt(self, prompt, timeout: float = 300) -> Answer:
        """Queue ``prompt``, whatever it is, and wait for its end."""
        status, text = self.send(json.dumps({"prompt": prompt, "client_id": self.id}).encode())
        if status != 200:
            return Answer(status, refusal(text))
        failed = []

        def remember(kind, data):
            if kind == "execution_error":
                failed.append(data)

        try:
            self.follow(json.loads(text)["prompt_id"], remember, timeout)
        except WorkflowError as error:
            if not failed:
                raise
            return Answer(status, str(error), failed[0])
        return Answer(status)

    def queue(self, prompt: dict) -> str:
        """Its id, at once."""
        return self._queue(prompt, {"extra_data": {"preview_method": "latent2rgb"}})

    def follow(self, prompt_id: str, on_event=None, timeout: float = 600):
        """Wait for the end of what was queued."""
        return self._loop.run_until_complete(self._follow(prompt_id, on_event, timeout))

    def vanish(self) -> None:
        """The connection is cut as by a closed laptop: nobody says goodbye."""
        self._socket._response.connection.transport.abort()
        self._loop.run_until_complete(self._session.close())
        self._loop.close()


def log_since(log: Path, place: int) -> str:
    with open(log, "rb") as file:
        file.seek(place)
        return file.read().decode(errors="replace")
