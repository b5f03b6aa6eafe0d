"""What the page shows in other languages: every text of every node is there, and says what the English says today."""

import re
from collections import Counter

import pytest

from chorus import nodes
from chorus.dev.tools import locales

LANGUAGES = ["ja", "zh"]
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")
CODE = re.compile(r"[A-Za-z]\w*(?:[_/.]\w+)+")  # start_percent, models/cas_dm, config.json, k_e
SYNTAX = re.compile(r"[{}@|$]")  # vue-i18n reads these as placeholders, links and plurals, in all texts but tooltips


@pytest.fixture(scope="module")
def files():
    return locales.english()


@pytest.fixture(scope="module")
def english(files):
    return locales.all_texts(files)


@pytest.fixture(scope="module")
def options():
    """What the combo widgets of a node offer, by node."""
    schemas = [node.define_schema() for node in locales.nodes()]
    return {s.node_id: {str(o) for i in s.inputs for o in getattr(i, "options", None) or []} for s in schemas}


@pytest.mark.parametrize("name", locales.FILES)
def test_the_english_file_is_what_the_schemas_say(files, name):
    assert locales.read("en", name) == files[name], "make it anew: dev/tools/locales.py"


def test_the_translated_languages_are_these():
    assert locales.languages() == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_missing_or_stale(english, language):
    found = locales.problems_of(language, english)
    assert not found, "mend, then accept with dev/tools/locales.py:\n" + "\n".join(found)


@pytest.mark.parametrize("node", nodes.NODES, ids=lambda node: node.define_schema().node_id)
def test_a_registered_node_has_a_text_for_every_id(node, files):
    schema = node.define_schema()
    entry = files["nodeDefs"][schema.node_id]
    assert entry["display_name"] and entry["description"]
    assert list(entry.get("inputs", {})) == [i.id for i in schema.inputs]
    assert list(entry.get("outputs", {})) == [
        str(n) for n, o in enumerate(schema.outputs) if o.display_name or o.tooltip
    ]


def pairs(english, language):
    """(key, English, translation) of what is translated."""
    translated = locales.translation(language)
    return [(key, text, translated[key]) for key, text in english.items() if key in translated]


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_stay(english, language):
    lost = [
        (key, text, said)
        for key, text, said in pairs(english, language)
        if Counter(NUMBER.findall(text)) - Counter(NUMBER.findall(said))
    ]
    assert not lost


@pytest.mark.parametrize("language", LANGUAGES)
def test_options_that_a_text_explains_stay(english, options, language):
    lost = []
    for key, text, said in pairs(english, language):
        explained = set(re.findall(r"(?:^|[.;,] )([\w+-]+):", text)) & options.get(key.split(".")[0], set())
        lost += [(key, word, said) for word in explained if not re.search(rf"{re.escape(word)}[:\uff1a]", said)]
    assert not lost


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_call_widgets_as_the_page_calls_them_and_files_by_their_names(english, options, language):
    translated = locales.translation(language)
    wrong = []
    for key, text, said in pairs(english, language):
        node = key.split(".")[0]
        for word in CODE.findall(text) if key.endswith((".tooltip", ".description")) else []:
            label = translated.get(f"{node}.inputs.{word}.name", word)
            known_as = {label, word} if word in options[node] else {label}
            if not any(name in said for name in known_as):
                wrong.append((key, known_as, said))
    assert not wrong


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_call_nodes_as_the_page_calls_them(english, language):
    texts = pairs(english, language)
    names = {text: said for key, text, said in texts if key.endswith(".display_name")}
    wrong = [
        (key, names[name], said)
        for key, text, said in texts
        for name in names
        if re.search(rf"\b{re.escape(name)}\b", text) and names[name] not in said
    ]
    assert not wrong


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_no_text_is_read_as_message_syntax(language):
    texts = locales.translation(language)
    assert not {key: text for key, text in texts.items() if SYNTAX.search(text) and not key.endswith(".tooltip")}


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_server_serves_it(comfy, language):
    served = comfy.get_json("/i18n")[language]
    assert served["nodeDefs"] == locales.read(language, "nodeDefs")
    assert served["nodeCategories"] == locales.read(language, "main")["nodeCategories"]


SOURCE = {"A.inputs.x.tooltip": "new words", "A.inputs.y.tooltip": "same", "A.inputs.z.tooltip": "never seen"}
TRANSLATED = {"A.inputs.x.tooltip": "alt", "A.inputs.y.tooltip": "gleich", "B.display_name": "weg"}
TRANSLATES = {"A.inputs.x.tooltip": "old words", "A.inputs.y.tooltip": "same"}


def test_what_is_stale_missing_or_asked_for_by_nobody_is_found():
    found = locales.problems(SOURCE, TRANSLATED, TRANSLATES)
    assert [line.splitlines()[0] for line in found] == [
        "stale: A.inputs.x.tooltip",
        "missing: A.inputs.z.tooltip",
        "nobody asks for it: B.display_name",
    ]
    assert "was: old words" in found[0]
    assert "now: new words" in found[0]


def test_a_translation_of_unknown_english_is_stale():
    assert locales.problems({"A.display_name": "name"}, {"A.display_name": "Name"}, {})[0].startswith(
        "stale: A.display_name"
    )


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


def test_accepting_all_leaves_what_is_missing(german):
    locales.accept("de", SOURCE)
    assert [line.splitlines()[0] for line in locales.problems_of("de", SOURCE)] == ["missing: A.inputs.z.tooltip"]


def test_what_is_not_translated_cannot_be_accepted(german):
    with pytest.raises(ValueError, match=r"de translates no A\.inputs\.z\.tooltip"):
        locales.accept("de", SOURCE, ("A.inputs.z.tooltip",))
