"""Attachments: further models or heads that a node of this pack adds to a MODEL besides patches.

For example, a blend runs further models in every sampling run, and a Cas-DM head refines the predictions. An attachment
describes its properties in a common form. SeedSelect, the training of heads and the blend read these properties without
importing the technique that made the attachment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from comfy.model_patcher import ModelPatcher

Conditioning = Sequence[Sequence]  # entries (tensor, options), as in ComfyUI's CONDITIONING


class Attachment:
    """Base class: an attachment that changes nothing. Techniques override the properties that differ."""

    needs_negative = False  # whether a run needs a negative conditioning even at cfg 1

    @property
    def rows_are_independent(self) -> bool:
        """Whether each row of a batch is sampled independently of the others."""
        return True

    @property
    def depends_on_history(self) -> str:
        """Error message, with the remedy, if a setting makes predictions depend on earlier steps; otherwise empty."""
        return ""

    @property
    def models(self) -> Sequence[ModelPatcher]:
        """Additional MODELs, as they were connected."""
        return ()

    @property
    def conditionings(self) -> Sequence[tuple[Conditioning | None, Conditioning | None]]:
        """(positive, negative) conditioning of each of ``models``; None where the sampler's conditioning is used."""
        return ()

    def patchers(self, base: ModelPatcher, conds: dict[str, list[dict]]) -> Sequence[ModelPatcher]:
        """One patcher for each of ``models``: it predicts beside ``base`` in a run with the sampler's ``conds``."""
        return ()

    def for_gradients(self, copy: Callable[[ModelPatcher], ModelPatcher]) -> Attachment:
        """This attachment for a run with gradients, which records nothing for display. ``copy`` copies its models."""
        return self

    @property
    def refusal_as_expert(self) -> str:
        """Error message if a MODEL with this attachment cannot be the expert of a blend; empty if it can."""
        return ""


def attached(model: ModelPatcher) -> list[Attachment]:
    """The attachments of this pack on ``model``."""
    return [a for a in model.attachments.values() if isinstance(a, Attachment)]
