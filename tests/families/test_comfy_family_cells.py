"""The pack with every model family of this ComfyUI, against independent computations and docs/compatibility.md."""

import pytest

from chorus.dev.tools import families
from chorus.tests.families.catalogue import FAMILIES, NOT_BUILT
from chorus.tests.families.family_cells import CELLS, Models, latent_spaces
from chorus.tests.families.outcome import outcome_of

pytestmark = pytest.mark.usefixtures("one_thread")

# cells that have found faults of the pack; each takes less than a second
QUICK = [
    ("SeedVR2", "same checkpoint"),  # the rows of a batch influence each other
    ("ErnieImage", "seed gradient"),  # a kernel without a derivative
    ("CogVideoX_T2V", "blend"),  # an unknown noise process
    ("StableAudio", "blend"),
]


@pytest.fixture(scope="module")
def known():
    return families.documented()[0]


def check(name, cells, known):
    models = Models(FAMILIES[name])
    found = {}
    for cell in cells:
        outcome = outcome_of(lambda: CELLS[cell](models))  # noqa: B023
        found[name, cell] = outcome.kind, outcome.text
    problems = families.differences(known, found, None)
    assert not problems, "\n".join([*problems, f"fix the wrong cells, then run `{families.COMMAND}`"])


def test_every_family_is_documented(known):
    rows = [*NOT_BUILT, *FAMILIES]
    found = {(row, cell) for row in rows for cell in CELLS}
    assert found == known.keys(), f"families or cells were added or removed; run `{families.COMMAND}`"


def test_latent_spaces_are_documented():
    assert families.space_table(latent_spaces()) in families.PATH.read_text(encoding="utf-8"), (
        f"the table of latent spaces is out of date; run `{families.COMMAND}`"
    )


@pytest.mark.parametrize(("family", "cell"), QUICK, ids=" ".join)
def test_quick_cells(family, cell, known):
    check(family, [cell], known)


def sampled(names):
    """Every third cell of each family. Every cell is tried with every third family."""
    return {name: [cell for j, cell in enumerate(CELLS) if (i + j) % 3 == 0] for i, name in enumerate(names)}


SAMPLED = sampled(FAMILIES)


@pytest.mark.slow  # a minute for all
@pytest.mark.parametrize("name", FAMILIES)
def test_sampled_cells_of_every_family(name, known):
    check(name, SAMPLED[name], known)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FAMILIES)
def test_other_cells_of_every_family(name, known):
    check(name, [cell for cell in CELLS if cell not in SAMPLED[name]], known)
