"""The example workflows, in the order in which they are built."""

from __future__ import annotations

from . import cas_dm_workflows, face_workflows, fusion_workflows, masked_token_workflows, seed_workflows

WORKFLOWS = [
    *fusion_workflows.WORKFLOWS,
    *masked_token_workflows.WORKFLOWS,
    *seed_workflows.WORKFLOWS,
    *cas_dm_workflows.WORKFLOWS,
    *face_workflows.WORKFLOWS,
]
