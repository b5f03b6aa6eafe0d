"""The cells of ComfyUI's nodes in docs/compatibility.md.

Each cell tries a node on the base, on the expert, on both, or after the blend, and compares with node_definition.py.
"""

import functools
import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from chorus.tests.families.catalogue import FAMILIES
from chorus.tests.families.family_cells import CFG, distance, parts, positions
from chorus.tests.families.host_nodes import ATTENTION, TRIED, Node, model_nodes, use_of
from chorus.tests.families.node_definition import reference
from chorus.tests.families.outcome import NotBuilt, Outcome, one_line, outcome_of
from chorus.tests.support.tiny_models import blend, ksample

PLACES = ("base", "expert", "both", "after the blend")
ROUNDING = 1e-5  # relative, of the latents in float32


@functools.lru_cache(maxsize=2)
def small_models(name):
    family = ATTENTION if name == ATTENTION.name else FAMILIES[name]
    return family.model(0), family.model(1)


class TriedNode:
    """A node with the first family on which it has an effect. ``problem``: why there is no such family, else ""."""

    def __init__(self, name: str, folder: Path) -> None:
        self.use = use_of(name)
        self.problem = ""
        families = [FAMILIES[self.use.family]] if self.use.family else TRIED
        for self.family in families:
            self.problem = self._problem(name, folder)
            if not self.problem:
                return

    def _problem(self, name: str, folder: Path) -> str:
        try:
            self.node = Node(name, self.family, folder)
            self.base, self.expert = small_models(self.family.name)
            self.prompts, self.expert_prompts = self.family.prompts(10), self.family.prompts(30)
            changed = distance(self.sample(self.node(self.expert)), self.sample(self.expert))
        except NotBuilt as reason:
            return str(reason)
        except Exception as error:
            return f"ComfyUI without the pack fails: {one_line(error)}"
        return "" if changed > 100 * ROUNDING else "it has no effect on the small models"

    def latent(self):
        return self.use.latent() if self.use.latent else self.family.latent()

    def sample(self, model):
        return ksample(model, *self.prompts, self.latent(), steps=self.use.steps, cfg=CFG, scheduler="simple")

    def check(self, place: str) -> None:
        if self.problem:
            raise NotBuilt(self.problem)
        height, width = positions(self.latent())
        half = torch.zeros(1, height, width)
        half[..., : width // 2] = 1.0
        base = self.node(self.base) if place in ("base", "both") else self.base
        expert = self.node(self.expert) if place in ("expert", "both") else self.expert
        blended, _ = blend(base, expert, *self.expert_prompts, region=half, region_mode="force")
        shapes = [part.shape for part in parts(self.latent()["samples"])]
        expected = reference(base, expert, self.expert_prompts, half.bool(), shapes)
        if place == "after the blend":
            blended, expected = self.node(blended), self.node(expected)
        error = distance(self.sample(blended), self.sample(expected))
        assert error < ROUNDING, f"differs from the definition by {error:.2g}"


def node_cells(names=None) -> Iterator[tuple[str, str, Outcome]]:
    """(node, place, outcome) of all cells, or only those of the nodes ``names``."""
    with tempfile.TemporaryDirectory() as folder:
        for name in model_nodes():
            if names is None or name in names:
                tried = TriedNode(name, Path(folder))
                yield from ((name, place, outcome_of(lambda: tried.check(place))) for place in PLACES)  # noqa: B023
                del tried
                gc.collect()
