"""The page of pictures that ``run.py demo`` writes."""

import html.parser

import pytest

import chorus_run
from chorus.dev.tools import gallery

NOTE = {"type": "MarkdownNote", "widgets_values": ["# A & B\n\nTwo <b> checkpoints.\n\nMore."]}


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.append(dict(attrs))


def test_text_is_the_first_paragraph_of_the_note():
    assert gallery.first_paragraph({"nodes": [{"type": "KSampler"}, NOTE]}) == "Two <b> checkpoints."
    assert gallery.first_paragraph({"nodes": []}) == ""


def test_page_shows_pictures_relative_to_its_folder_and_escapes_text(tmp_path):
    picture = tmp_path / "A & B - x_00001.png"
    entries = [
        gallery.Entry("A & B", "Two <b> checkpoints.", 1.25, [(picture, "x")]),
        gallery.Entry("Big", "", remark="Skipped: it needs big.safetensors."),
    ]
    text = gallery.write(entries, tmp_path).read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.found == [{"src": "A%20%26%20B%20-%20x_00001.png", "alt": "x"}]
    assert "A &amp; B" in text and "Two &lt;b&gt; checkpoints." in text and "1.2 s" in text
    assert "Skipped: it needs big.safetensors." in text
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


def test_demo_runs_at_most_ten_workflows_and_all_of_them_exist():
    assert len(set(chorus_run.DEMO)) == len(chorus_run.DEMO) <= 10
    for name in chorus_run.DEMO:
        assert (chorus_run.ROOT / "example_workflows" / f"{name}.json").is_file(), name


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(["demo"], len(chorus_run.DEMO)), (["demo", "--only", "Plain blend"], 1), (["demo", "--all"], None)],
)
def test_options_choose_the_workflows(argv, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(chorus_run, "host_for", lambda options: None)
    monkeypatch.setattr(chorus_run, "need_tools", lambda host: None)
    monkeypatch.setattr(chorus_run, "server", lambda *args, **kwargs: _Server())
    monkeypatch.setattr(chorus_run, "module", lambda host, name, *words: seen.extend(words[2:]) or [])
    monkeypatch.setattr(chorus_run, "call", lambda host, command: 0)
    assert chorus_run.main(argv) == 0
    every = len(list((chorus_run.ROOT / "example_workflows").glob("*.json")))
    assert len(seen) == (every if expected is None else expected)


class _Server:
    address = "127.0.0.1:1"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass
