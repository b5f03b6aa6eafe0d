"""Translations of the nodes: every text is present and up to date with the English text."""

import re
from collections import Counter

import pytest

from chorus import nodes
from chorus.dev.tools import locales

LANGUAGES = ["ja", "zh"]
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")
CODE = re.compile(r"[A-Za-z]\w*(?:[_/.]\w+)+")  # start_percent, models/cas_dm, config.json, k_e
SYNTAX = re.compile(r"[{}@|$]")  # vue-i18n parses these as placeholders, links and plurals in all texts except tooltips


@pytest.fixture(scope="module")
def files():
    return locales.english()


@pytest.fixture(scope="module")
def english(files):
    return locales.all_texts(files)


@pytest.fixture(scope="module")
def options():
    """Options of combo widgets, by node id."""
    schemas = [node.define_schema() for node in locales.nodes()]
    return {s.node_id: {str(o) for i in s.inputs for o in getattr(i, "options", None) or []} for s in schemas}


@pytest.mark.parametrize("name", locales.FILES)
def test_english_file_matches_the_schemas(files, name):
    assert locales.read("en", name) == files[name], "outdated: run python run.py locales"


def test_translated_languages():
    assert locales.languages() == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_complete_and_current(english, language):
    found = locales.problems_of(language, english)
    assert not found, "`python run.py locales` shows how to update the translations:\n" + "\n".join(found)


@pytest.mark.parametrize("node", nodes.NODES, ids=lambda node: node.define_schema().node_id)
def test_every_input_and_output_of_a_node_has_a_text(node, files):
    schema = node.define_schema()
    entry = files["nodeDefs"][schema.node_id]
    assert entry["display_name"] and entry["description"]
    assert list(entry.get("inputs", {})) == [i.id for i in schema.inputs]
    assert list(entry.get("outputs", {})) == [
        str(n) for n, o in enumerate(schema.outputs) if o.display_name or o.tooltip
    ]


def pairs(english, language):
    """(key, English text, translation) of all translated texts."""
    translated = locales.translation(language)
    return [(key, text, translated[key]) for key, text in english.items() if key in translated]


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_are_kept_in_translations(english, language):
    lost = [
        (key, text, translated_text)
        for key, text, translated_text in pairs(english, language)
        if Counter(NUMBER.findall(text)) - Counter(NUMBER.findall(translated_text))
    ]
    assert not lost


@pytest.mark.parametrize("language", LANGUAGES)
def test_explained_options_are_kept_in_translations(english, options, language):
    """Texts explain an option as "own: ..."; translations must contain the option's name before a colon."""
    lost = []
    for key, text, translated_text in pairs(english, language):
        explained = set(re.findall(r"(?:^|[.;,] )([\w+-]+):", text)) & options.get(key.split(".")[0], set())
        lost += [
            (key, word, translated_text)
            for word in explained
            if not re.search(rf"{re.escape(word)}[:\uff1a]", translated_text)
        ]
    assert not lost


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_use_the_labels_of_widgets_and_the_names_of_files(english, options, language):
    translated = locales.translation(language)
    wrong = []
    for key, text, translated_text in pairs(english, language):
        node = key.split(".")[0]
        for word in CODE.findall(text) if key.endswith((".tooltip", ".description")) else []:
            label = translated.get(f"{node}.inputs.{word}.name", word)
            allowed = {label, word} if word in options[node] else {label}
            if not any(name in translated_text for name in allowed):
                wrong.append((key, allowed, translated_text))
    assert not wrong


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_use_the_display_names_of_nodes(english, language):
    texts = pairs(english, language)
    names = {text: translated_text for key, text, translated_text in texts if key.endswith(".display_name")}
    wrong = [
        (key, names[name], translated_text)
        for key, text, translated_text in texts
        for name in names
        if re.search(rf"\b{re.escape(name)}\b", text) and names[name] not in translated_text
    ]
    assert not wrong


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_no_text_contains_message_syntax(language):
    texts = locales.translation(language)
    assert not {key: text for key, text in texts.items() if SYNTAX.search(text) and not key.endswith(".tooltip")}


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_server_serves_the_translations(client, language):
    served = client.get_json("/i18n")[language]
    assert served["nodeDefs"] == locales.read(language, "nodeDefs")
    assert served["settings"] == locales.read(language, "settings")
    for name, texts in locales.read(language, "main").items():
        assert served[name] == texts


SOURCE = {"A.inputs.x.tooltip": "new words", "A.inputs.y.tooltip": "same", "A.inputs.z.tooltip": "never seen"}
TRANSLATED = {"A.inputs.x.tooltip": "alt", "A.inputs.y.tooltip": "gleich", "B.display_name": "weg"}
TRANSLATES = {"A.inputs.x.tooltip": "old words", "A.inputs.y.tooltip": "same"}


def test_stale_missing_and_unused_translations_are_reported():
    found = locales.problems(SOURCE, TRANSLATED, TRANSLATES)
    assert [line.splitlines()[0] for line in found] == [
        "stale: A.inputs.x.tooltip",
        "missing: A.inputs.z.tooltip",
        "unused: B.display_name",
    ]
    assert "was: old words" in found[0]
    assert "now: new words" in found[0]


def test_new_translation_is_reported_until_it_is_accepted():
    assert locales.problems({"A.display_name": "name"}, {"A.display_name": "Name"}, {}) == [
        "not accepted yet: A.display_name\n    English: name\n    translated: Name"
    ]


@pytest.fixture
def german(tmp_path, monkeypatch):
    monkeypatch.setattr(locales, "FOLDER", tmp_path)
    nested = {"A": {"inputs": {"x": {"tooltip": "alt"}, "y": {"tooltip": "gleich"}}}}
    locales.write("de", "nodeDefs", nested)
    locales.write("de", locales.SOURCE, TRANSLATES)


def test_accepting_one_text_leaves_the_others_stale(german):
    source = {**SOURCE, "A.inputs.y.tooltip": "also new"}
    locales.accept("de", source, ("A.inputs.y.tooltip",))
    found = locales.problems_of("de", source)
    assert [line.splitlines()[0] for line in found] == ["stale: A.inputs.x.tooltip", "missing: A.inputs.z.tooltip"]


def test_texts_without_translation_are_still_missing_after_accepting_all(german):
    locales.accept("de", SOURCE)
    assert [line.splitlines()[0] for line in locales.problems_of("de", SOURCE)] == ["missing: A.inputs.z.tooltip"]


def test_report_names_the_files_and_the_command(german, monkeypatch, capsys):
    monkeypatch.setattr(locales, "english", lambda: {"nodeDefs": {"A": {"inputs": {"x": {"tooltip": "new words"}}}}})
    assert locales.main() == 1
    shown = capsys.readouterr().out
    assert shown.startswith("written: locales/en/nodeDefs.json\nde: 2 to update among 1 texts\n  stale: A.inputs.x")
    assert "into locales/de/nodeDefs.json" in shown
    assert shown.endswith("python run.py locales accept de KEY [KEY ...]\n")
    locales.write("de", "nodeDefs", {"A": {"inputs": {"x": {"tooltip": "neu"}}}})
    locales.write("de", locales.SOURCE, {"A.inputs.x.tooltip": "new words"})
    assert locales.main() == 0
    assert capsys.readouterr().out.endswith("de: up to date\n")


def test_missing_translation_cannot_be_accepted(german):
    with pytest.raises(ValueError, match=r"expected keys of de such as .*, got A\.inputs\.z\.tooltip"):
        locales.accept("de", SOURCE, ("A.inputs.z.tooltip",))
