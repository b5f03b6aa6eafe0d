"""ComfyUI's web page of the user who queued the running prompt: which of its nodes are running, settings, and messages.

Without a server, or for a prompt that no page queued, there is no page.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import nodes
from comfy.cli_args import args
from comfy_execution.graph import DynamicPrompt
from comfy_execution.graph_utils import is_link
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from server import PromptServer


@dataclass(frozen=True)
class Page:
    """The page that queued the running prompt, and the prompt's node that is running."""

    server: PromptServer
    client: str
    prompt: DynamicPrompt
    node: str

    @classmethod
    def of_running_prompt(cls) -> Page | None:
        """The page, or None if ComfyUI runs as a library, or if no page or other client queued the prompt."""
        server, context = getattr(PromptServer, "instance", None), get_executing_context()
        client = getattr(server, "client_id", None)
        if server is None or client is None or context is None:
            return None
        return cls(server, client, get_progress_state().dynprompt, context.node_id)

    @property
    def is_connected(self) -> bool:
        return self.client in self.server.sockets

    def send(self, event: str, data: dict[str, Any]) -> None:
        """Send an event to the page, from any thread; the page's extensions receive it by its name."""
        self.server.send_sync(event, data, self.client)

    def setting(self, id: str) -> Any:
        """The value of a setting of the page; None if the user has not changed it.

        With --multi-user, each user has own settings, and the server does not know who queued a prompt: the result is
        None.
        """
        if args.multi_user:
            return None
        request: Any = SimpleNamespace(headers={})  # of the default user, the only one
        return self.server.user_manager.settings.get_settings(request).get(id)

    def kind(self, node: str) -> str:
        """The type of a node, by its id in the prompt."""
        return self.prompt.get_node(node)["class_type"]

    def pack(self, node: str) -> str:
        """The Python module that the type of ``node`` comes from: "nodes" of ComfyUI, or that of a custom node pack."""
        return getattr(nodes.NODE_CLASS_MAPPINGS[self.kind(node)], "RELATIVE_PYTHON_MODULE", "nodes")

    def displayed(self, node: str) -> str:
        """The id of ``node`` in the page; for a node that was added during the run, that of the node it belongs to."""
        return self.prompt.get_display_node_id(node)

    def sources(self, not_through: Container[str]) -> Iterator[str]:
        """The nodes whose outputs the running node gets, directly or through others.

        Links of the types in ``not_through`` are not followed.
        """
        waiting, seen = [self.node], {self.node}
        while waiting:
            for value in self.prompt.get_node(waiting.pop())["inputs"].values():
                if is_link(value) and value[0] not in seen and self._type_of_output(*value) not in not_through:
                    seen.add(value[0])
                    waiting.append(value[0])
                    yield value[0]

    def _type_of_output(self, node: str, output: int) -> str:
        return nodes.NODE_CLASS_MAPPINGS[self.kind(node)].RETURN_TYPES[int(output)]
