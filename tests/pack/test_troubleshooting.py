"""docs/troubleshooting.md quotes messages that the code really raises."""

import re

import pytest

from chorus.dev.tools.setup import ROOT, SHIPPED
from chorus.dev.tools.texts import messages

PAGE = ROOT / "docs" / "troubleshooting.md"
HEADING = re.compile(r"^### `(.+)`$", re.M)
QUOTED = HEADING.findall(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def raised():
    """All messages, with the constants of their modules in place of ``{NAME}``."""
    found = []
    for path in (p for folder in SHIPPED for p in (ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        constants = dict(re.findall(r'^([A-Z_]+) = "(.+)"$', source, re.M))
        for _, text in messages(source):
            for name, value in constants.items():
                text = text.replace(f"{{{name}}}", value)
            found.append(text)
    return found


def parts(quoted: str) -> list[str]:
    """The parts of a message that do not vary."""
    return [part for part in (part.strip() for part in quoted.split("…")) if part]


def occurs(quoted: str, message: str) -> bool:
    """Whether the parts occur in this order in the constant text of ``message``."""
    return re.search(".*?".join(map(re.escape, parts(quoted))), message, re.S) is not None


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_message_is_raised(quoted, raised):
    assert any(occurs(quoted, message) for message in raised)
    assert max(map(len, parts(quoted))) > 8, "too little text to recognise the message"


def test_each_message_has_a_cause_and_a_remedy():
    assert len(QUOTED) >= 20 and len(set(QUOTED)) == len(QUOTED)
    _, *entries = re.split(HEADING, PAGE.read_text(encoding="utf-8"))
    for quoted, text in zip(entries[::2], entries[1::2], strict=True):
        assert "- **Cause**: " in text and "- **Remedy**: " in text, quoted


def test_unknown_message_is_noticed(raised):
    assert not any(occurs("the latent format of '…' is …, that of the ghost is …", message) for message in raised)
