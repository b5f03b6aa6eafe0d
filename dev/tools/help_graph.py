"""A workflow in API format, built and run for the pictures of the help pages."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .client import Comfy, Result


class Node:
    """A node of a Graph; ``node["name"]`` is the wire of its output of that name."""

    def __init__(self, id: str, names: list[str], kinds: list[str]):
        self.id, self.names, self.kinds = id, names, kinds

    def __getitem__(self, name: str) -> list:
        return [self.id, self.names.index(name)]

    def wire(self, kind: str) -> list:
        """Of its only output of a kind."""
        found = [index for index, own in enumerate(self.kinds) if own == kind]
        if len(found) != 1:
            raise ValueError(f"node {self.id} has {len(found)} outputs {kind}; name one of {self.names}")
        return [self.id, found[0]]


@dataclass
class Panel:
    """Pictures in a row under a caption. ``shows``: a node or wire of an IMAGE, or the pictures themselves."""

    caption: str
    shows: object = ()
    scale: float = 3  # of a demo checkpoint's 64 pixels, which stay square
    count: int | None = None  # of the pictures that a node gives, the first


class Graph:
    """A workflow in API format on a server; widgets that are not given have their defaults."""

    def __init__(self, comfy: Comfy, base: Path):
        self.comfy, self.base, self.info, self.prompt = comfy, base, comfy.get_json("/object_info"), {}

    def another(self) -> Graph:
        """An empty one, which knows the files that were saved meanwhile."""
        return Graph(self.comfy, self.base)

    def add(self, kind: str, **inputs) -> Node:
        """Values, wires, or nodes that have one output of the input's kind."""
        known, required = self.info[kind]["input"], self.info[kind]["input"].get("required", {})
        specs = {**required, **known.get("optional", {})}
        content = {name: value for name, spec in required.items() if (value := default(spec)) is not None}
        for name, value in inputs.items():
            content[name] = value.wire(specs[name][0]) if isinstance(value, Node) else value
        node = Node(str(len(self.prompt) + 1), self.info[kind]["output_name"], self.info[kind]["output"])
        self.prompt[node.id] = {"class_type": kind, "inputs": content}
        return node

    def saved(self, kind: str, name: str) -> str:
        """The only file that the loader ``kind`` offers whose name holds ``name``."""
        spec = next(iter(self.info[kind]["input"]["required"].values()))
        if kind == "LoadMaskedTokenLora":
            spec = self.info[kind]["input"]["required"]["lora_name"]
        (file,) = (option for option in options(spec) if name in option)
        return file

    def run(self) -> Result:
        return self.comfy.run(self.prompt, timeout=1800)

    def read(self, *texts) -> list[list[str]]:
        """What wires of text carry, each as a list."""
        nodes = [self.add("PreviewAny", source=wire) for wire in texts]
        outputs = self.run().outputs
        return [outputs[node.id]["text"] for node in nodes]

    def shoot(self, rows: list[list[Panel]]) -> list[list[Panel]]:
        """Run it; the panels with pictures in place of nodes and wires."""
        shown = {}
        for panel in (panel for row in rows for panel in row):
            if isinstance(panel.shows, Node) or (panel.shows and isinstance(panel.shows[0], str)):
                shown[self.add("PreviewImage", images=panel.shows).id] = panel
        found = {id: [] for id in shown}
        for node, _, data in self.comfy.images(self.run(), kind="temp"):
            if node in found:
                found[node].append(Image.open(io.BytesIO(data)).convert("RGB"))
        for id, panel in shown.items():
            panel.shows = found[id][: panel.count]
        return rows


def options(spec: list) -> list:
    """What a combo offers: the server writes those of old and of new nodes in two ways."""
    return spec[0] if isinstance(spec[0], list) else spec[1].get("options", [])


def default(spec: list):
    """Of a widget; None for a socket."""
    offered = options(spec) if isinstance(spec[0], list) or spec[0] == "COMBO" else []
    given = spec[1] if len(spec) > 1 else {}
    return given.get("default", offered[0] if offered else None)
