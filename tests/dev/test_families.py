"""The tool for docs/compatibility.md: it writes the cells, reads them again, and compares them with new outcomes."""

import pytest

from chorus.dev.tools import families

FAMILIES = {
    ("SD15", "blend"): ("equal", ""),
    ("SD15", "seed search"): ("refused", "expected [B, C, H, W], got video; use images"),
    ("SAM3", "blend"): ("not built", "not generative"),
    ("SAM3", "seed search"): ("not built", "not generative"),
}
SPACES = {"SD15 (4 channels, scale 0.18215)": ["SD15", "SD20"], "Mochi (12 channels, scale 1)": ["GenmoMochi"]}
NODES = {("RescaleCFG", "base"): ("equal", ""), ("RescaleCFG", "expert"): ("refused", "put it on the base")}


def test_written_cells_are_read_again():
    text = families.page(FAMILIES, NODES, SPACES, "0.30.0")
    assert families.read(text) == (FAMILIES, NODES)
    assert text.count("`not generative`") == 1, "equal messages must share a note"
    assert "| SD15 (4 channels, scale 0.18215) | SD15; SD20 |" in text
    assert "Mochi" not in text, "a latent space of one family is listed"


def test_new_changed_wrong_and_missing_cells_are_reported():
    found = {
        ("SD15", "blend"): ("wrong", "x0 differs"),
        ("SD15", "seed search"): FAMILIES["SD15", "seed search"],
        ("Flux", "blend"): ("equal", ""),
    }
    assert families.differences(FAMILIES, found, ["SD15", "Flux"]) == [
        "SD15, blend: equal\n    now: wrong x0 differs",
        "Flux, blend: missing\n    now: equal",
        "SAM3: this ComfyUI does not have it",
    ]


def test_wrong_cell_is_reported_even_if_documented():
    wrong = {("SD15", "blend"): ("wrong", "x0 differs")}
    assert len(families.differences(wrong, wrong, None)) == 1


def test_unknown_word_in_a_table_is_rejected():
    with pytest.raises(ValueError, match=r"got perfect; run `python run.py families --write`"):
        families.read(families.page(FAMILIES, NODES, SPACES, "0.30.0").replace("| equal |", "| perfect |", 1))
