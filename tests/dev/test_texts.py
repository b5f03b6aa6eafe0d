"""The list of texts that users read: it has every error and log message of the source."""

from chorus.dev.tools import texts

SOURCE = """
def f(x, folder):
    if x < 0:
        raise ValueError(f"x {x:g} is negative;" " use 0 or more")
    if x == 1:
        raise KeyError
    log.warning("no %s in the folder", folder)
    logger.info("read " + folder)
    raise Problem("first" if x else "second") from None
    print("not a message")
"""


def test_errors_and_log_lines_are_listed_with_their_lines():
    assert sorted(texts.messages(SOURCE)) == [
        (4, "x {x} is negative; use 0 or more"),
        (7, "no %s in the folder"),
        (8, "read {...}"),
        (9, "first | second"),
    ]


def test_all_kinds_are_printed(capsys):
    assert texts.main() == 0
    out = capsys.readouterr().out
    for part in (
        "kernels/saliency_blend/__init__.py:",
        "SaliencyNoiseBlend (Saliency Noise Blend):",
        "web/docs/SeedSelect.md",
    ):
        assert part in out


def test_unknown_kind_rejected(capsys):
    assert texts.main("jokes") == 1
    assert "got jokes" in capsys.readouterr().err
