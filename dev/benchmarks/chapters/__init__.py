"""The chapters of BENCHMARKS.md: words in <name>.md, numbers from <name>.py.

A chapter's module has ``RESULTS``, the result files that it tells of (paths from the pack's folder; a missing one is
None), ``fields(*results)``, the text of every {field} of its template, and ``claims(*results)``, its rows in the README.
Links in the templates are relative to the pack's folder, where both pages lie. No template holds a measured number: see
tests/dev/test_report.py.
"""

FOLDERS = ("dev/benchmarks/results", "demo/results")
ORDER = (
    "fusion_effect",
    "blend_speed",
    "fusion_cost",
    "fusion_fidelity",
    "seed_rare_signs",
    "seed_cost",
    "cas_dm_quality",
    "cas_dm_cost",
    "face_refiner_quality",
    "face_refiner_speed",
    "masked_tokens_speed",
    "masked_tokens_signs",
    "demo_signs",
    "robustness",
)
