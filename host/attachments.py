"""What a node of this pack hangs on a MODEL beside patches, told to those who run the MODEL and do not know the node.

A blend brings further models into every run, a Cas-DM head refines its predictions. SeedSelect, the training of heads
and the blend itself ask the attachment what that means for them, and need not import the technique it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from comfy.model_patcher import ModelPatcher

Conditioning = Sequence[Sequence]  # entries (tensor, options), as the host's CONDITIONING


class Attachment:
    """A neutral attachment. Techniques derive from it and say where theirs is not neutral."""

    needs_negative = False  # whether a run needs a negative conditioning at cfg 1, too

    @property
    def rows_are_independent(self) -> bool:
        """Whether each row of a batch is sampled as if it were alone."""
        return True

    @property
    def depends_on_history(self) -> str:
        """What makes a prediction depend on earlier steps, and the remedy; empty: nothing does."""
        return ""

    @property
    def models(self) -> Sequence[ModelPatcher]:
        """The further MODELs, as they were wired."""
        return ()

    @property
    def conditionings(self) -> Sequence[tuple[Conditioning | None, Conditioning | None]]:
        """(positive, negative) of each of ``models``; None where the sampler's is used."""
        return ()

    def patchers(self, base: ModelPatcher, conds: dict[str, list[dict]]) -> Sequence[ModelPatcher]:
        """The patchers that predict beside ``base`` in a run with the sampler's ``conds``, one for each of ``models``."""
        return ()

    def for_gradients(self, copy: Callable[[ModelPatcher], ModelPatcher]) -> Attachment:
        """This attachment for a run that records gradients: on copies of its models, and without records of its own."""
        return self

    def refusal_as_expert(self, label: str) -> str:
        """Why a MODEL with this attachment cannot be the expert ``label`` of a blend; empty if it can."""
        return ""


def attached(model: ModelPatcher) -> list[Attachment]:
    """The attachments of this pack on ``model``."""
    return [a for a in model.attachments.values() if isinstance(a, Attachment)]
