"""Paths stay inside their folders: nodes save only below the output folder and load only from their own folders.

Every saving and loading node is tried with names that point outside or are unusual. After each attempt, files around
the output folder must be unchanged, and no file inside may be overwritten.
"""

import os
from pathlib import Path

import folder_paths
import pytest
import torch

from chorus.dev.tools.client import WorkflowError
from chorus.tests.robustness.loader import NODES
from chorus.tests.robustness.savers import savers

OUTSIDE = [
    *("../x", "../../x", "a/../../x", "a/b/../../../x", "./../x", "..//x", "../output2/x", "../output", "/x", "//x"),
    *("/etc/x", "/tmp/x", "{outside}/x", "link/x", "link/deeper/x", "a/../link/x", "link/../../x", "../input/x"),
]
NAMELESS = ["", " ", ".", "..", "a/..", "a/../..", "/", "//", "./", "...", " . ", "a/ . "]
IMPOSSIBLE = ["x\0y", "\0", "a\0/../../x", "x" * 5000, "a/" * 3000 + "x", "ü" * 120, "x\ud800y", "\udcff/x"]
# names that are unusual or special on other systems, but valid below the output folder on Linux and macOS
UNUSUAL = [
    *(
        "C:\\x",
        "..\\x",
        "..\\..\\x",
        "\\\\server\\x",
        "%date:..%",
        "%date:../..%x",
        "%year%/x",
        "%width%",
        "~",
        "~/x",
        "~root/x",
    ),
    *(
        "CON",
        "NUL",
        "nul.txt",
        "COM1/x",
        "x.",
        "x ",
        " x",
        "x...",
        "…",
        "\uff0e\uff0e/x",
        "\u2024\u2024/x",
        "$(touch x)",
        "`x`",
        "x;y",
        "-rf",
    ),
    *(
        "x\ny",
        "x\ty",
        "*",
        "?",
        "x/",
        "x//",
        "x/y/",
        "x/.",
        "a/./x",
        "..x",
        "x..",
        ".x",
        "..x/..y",
        "x.safetensors",
        "x.part",
    ),
    *("ü", "名前", "\u202egnp.x", "a/../x", "{output}/inside"),
]
WINDOWS = os.name == "nt"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with ComfyUI's folders and others. The output folder contains a link to a folder outside it."""
    for name in ("input", "output", "output2", "outside/deeper", "temp"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outside/x").write_text("secret")
    (tmp_path / "output/link").symlink_to(tmp_path / "outside", target_is_directory=True)
    for name in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=tmp_path / name: str(folder))
    monkeypatch.chdir(tmp_path / "outside")
    monkeypatch.setenv("HOME", str(tmp_path / "outside"))
    return tmp_path


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return savers(large=False)


def tree(root: Path) -> dict[str, tuple]:
    """Inode, mode and content of everything below ``root``, without following links."""
    entries = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            state = os.lstat(path)
            content = Path(path).read_bytes() if name in files and not os.path.islink(path) else b""
            entries[os.path.relpath(path, root)] = state.st_ino, state.st_mode, content
    return entries


def name_patterns(saver: str) -> list[str]:
    """Patterns of the prefixes under which nodes save. Training nodes append a suffix to the given name."""
    trained = saver in ("SaveCasDMHead", "SaveFaceRefiner", "SaveMaskedTokenLora")
    return ["{}", "{}_interrupted_step5"] if trained else ["{}"]


SAVERS = [
    "SaveSeed",
    "SaveCasDMHead",
    "SaveFaceRefiner",
    "SaveMaskedTokenLora",
    "SaveMaskedTokens",
    "SaveTrainingPairs",
]


@pytest.mark.skipif(WINDOWS, reason="these are paths of Linux and macOS")
@pytest.mark.parametrize("name", SAVERS)
def test_nothing_is_written_outside_or_overwritten(place, small, name, record_property):
    saver, refused, written = small[name], 0, 0
    assert set(small) == set(SAVERS)
    for raw in (*OUTSIDE, *NAMELESS, *IMPOSSIBLE, *UNUSUAL):
        value = raw.replace("{outside}", str(place / "outside")).replace("{output}", str(place / "output"))
        for pattern in name_patterns(name):
            prefix = pattern.format(value)
            before = tree(place)
            try:
                saver.save(prefix)
                refused_here = False
            except ValueError as error:
                refused_here = True
                assert type(error) is ValueError and len(str(error)) < 3000
                assert any(word in str(error) for word in ("filename_prefix", "folder")), error
            after = tree(place)
            outside = {key for key in before | after if not key.startswith("output" + os.sep) and key != "output"}
            assert {key: before.get(key) for key in outside} == {key: after.get(key) for key in outside}, prefix
            # nothing inside has changed except the list of a data set, which grows
            for key, was in before.items():
                grown = key.endswith("prompts.jsonl") and after[key][2].startswith(was[2])
                assert after.get(key) == was or grown, (prefix, key)
            new = after.keys() - before.keys()
            if refused_here:
                assert not new, (prefix, new)
                refused += 1
            else:
                written += 1
                files = [place / key for key in new if (place / key).is_file()]
                assert files and not any(file.name.endswith(".part") for file in files), prefix
                if written > 3:  # the first files stay, to check that they are not overwritten
                    for file in files:
                        file.unlink()
                    for folder in sorted((place / key for key in new if (place / key).is_dir()), reverse=True):
                        folder.rmdir()
            if raw in (*OUTSIDE, *IMPOSSIBLE):
                assert refused_here, prefix
            if raw in NAMELESS and pattern == "{}":
                assert refused_here or (raw in ("...", " . ", "a/ . ") and saver.folder), prefix
    record_property("refused", refused)
    record_property("written", written)


@pytest.mark.parametrize("name", [name for name in SAVERS if name != "SaveTrainingPairs"])
@pytest.mark.parametrize("prefix", ["x", "a/x", "a/x/", "./x", "a//x", "%year%", "x_00001_", "x.y"])
def test_repeated_name_gets_the_next_number(place, small, name, prefix):
    for number in (1, 2, 3):
        before = tree(place / "output")
        small[name].save(prefix)
        [new] = [key for key in tree(place / "output").keys() - before.keys() if key.endswith(".safetensors")]
        assert f"_{number:05}_" in new


@pytest.mark.skipif(WINDOWS, reason="links need special rights on Windows")
@pytest.mark.parametrize("part", ["prompts.jsonl", "source", "target"])
def test_links_in_a_data_set_to_the_outside_rejected(place, small, part):
    (place / "output/pairs").mkdir()
    (place / "output/pairs" / part).symlink_to(place / "outside" / ("x" if "." in part else "deeper"))
    before = tree(place)
    with pytest.raises(ValueError, match="is behind a link that leads out of the output folder"):
        small["SaveTrainingPairs"].save("pairs")
    assert tree(place) == before


@pytest.mark.skipif(WINDOWS, reason="links need special rights on Windows")
@pytest.mark.parametrize("target", ["x", "gone"])
def test_link_at_the_target_path_is_not_followed(place, small, target):
    for ending in ("", ".part"):
        (place / f"output/y_00001_.seed.safetensors{ending}").symlink_to(place / "outside" / target)
    small["SaveSeed"].save("y")
    assert (place / "outside/x").read_text() == "secret" and not (place / "outside/gone").exists()
    assert (place / "output/y_00002_.seed.safetensors").is_file()


# ---- loading ----

LOADING = {
    "LoadCasDMHead": ("file", ".safetensors"),
    "LoadFaceRefiner": ("file", ".pth"),
    "LoadSeed": ("file", ".seed.safetensors"),
    "LoadMaskedTokens": ("file", ".tokens.safetensors"),
    "LoadMaskedTokenLora": ("lora_name", ".safetensors"),
    "LoadTrainingPairs": ("folder", ""),
    "LoadMaskedTokenModel": ("model_folder", ""),
}
NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "../outside/x{}",
    "{{outside}}/x{}",
    "../x{}",
    "a/../../outside/x{}",
    "..\\x{}",
]
NAMES += [
    "../outside/x{} [output]",
    "{{outside}}/x{} [input]",
    "x\0{}",
    "x" * 5000 + "{}",
    "",
    ".",
    "..",
    "/",
    "link/x{}",
    "link/../outside/x{} [output]",
]
NAMES += [
    "~/x{}",
    "file://{{outside}}/x{}",
    "../outside/x{} [temp]",
    "/proc/self/environ",
    "[output]",
]


@pytest.mark.skipif(WINDOWS, reason="these are paths of Linux and macOS")
@pytest.mark.parametrize("name", LOADING)
def test_nothing_outside_is_read(place, monkeypatch, name):
    id, ending = LOADING[name]
    for folder in (place / "outside", place):
        (folder / f"x{ending}").write_bytes(b"secret")
    for kind in ("cas_dm", "face_refiner", "masked_token", "loras", "text_encoders"):
        models = place / "models" / kind
        models.mkdir(parents=True)
        known = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(models)], known))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    cls, opened = NODES[name], []
    hook = opened.append
    files = [place / "outside", place / f"x{ending}", Path("/etc"), Path("/proc")]
    with recording_opened_files(hook):
        for raw in NAMES:
            value = raw.format(ending).replace("{outside}", str(place / "outside"))
            validated = {} if name == "LoadMaskedTokenLora" else {id: value}
            if validated and "validate_inputs" in vars(cls):
                assert isinstance(cls.validate_inputs(**validated), str), value
            others = {
                "LoadMaskedTokenLora": dict(model=None, strength=1.0, alpha=0.0),
                "LoadTrainingPairs": dict(first=0, count=0),
                "LoadMaskedTokenModel": dict.fromkeys(
                    ("transformer_file", "vq_file", "text_encoder_file"), "from the folder"
                ),
            }
            with pytest.raises(ValueError) as error, torch.inference_mode():
                cls.execute(**{id: value}, **others.get(name, {}))
            assert type(error.value) is ValueError and "secret" not in str(error.value), value
    read = [path for path in opened if any(Path(path).is_relative_to(file) for file in files)]
    assert not read


class recording_opened_files:
    """Context that calls ``callback(path)`` for every file that Python opens by an absolute path.

    Audit hooks cannot be removed, so all contexts use one hook.
    """

    callback = None

    def __init__(self, callback):
        self.own_callback = callback

    def __enter__(self):
        import sys

        if not hasattr(recording_opened_files, "installed"):
            recording_opened_files.installed = True
            sys.addaudithook(recording_opened_files.audit)
        recording_opened_files.callback = self.own_callback

    def __exit__(self, *_):
        recording_opened_files.callback = None

    @staticmethod
    def audit(event, arguments):
        # an audit hook stays until the process ends, when the names of this module are already gone
        if (
            recording_opened_files is not None
            and recording_opened_files.callback is not None
            and event == "open"
            and isinstance(arguments[0], str)
            and os.path.isabs(arguments[0])
        ):
            recording_opened_files.callback(arguments[0])


@pytest.mark.parametrize("name", LOADING)
def test_server_rejects_names_that_it_does_not_offer(client, name):
    id, ending = LOADING[name]
    needs = {"LoadTrainingPairs": dict(first=0, count=0), "LoadMaskedTokenModel": {}}
    prompt = {
        "1": {"class_type": name, "inputs": {id: f"../../../../etc/passwd{ending}", **needs.get(name, {})}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    if name == "LoadMaskedTokenModel":
        parts = ("transformer_file", "vq_file", "text_encoder_file")
        prompt["1"]["inputs"] |= dict.fromkeys(parts, "../../etc/passwd")
    if name == "LoadMaskedTokenLora":
        model = dict.fromkeys(("transformer_file", "vq_file", "text_encoder_file"), "from the folder")
        prompt["3"] = {"class_type": "LoadMaskedTokenModel", "inputs": {"model_folder": "chorus-demo", **model}}
        prompt["1"]["inputs"] |= {"model": ["3", 0], "strength": 1.0, "alpha": 0.0}
    with pytest.raises(WorkflowError, match="passwd"):
        client.run(prompt)


@pytest.mark.parametrize("prefix", ["../x", "/etc/x", "x\0y", "x" * 5000, ".."])
def test_error_about_the_prefix_reaches_the_user(server, client, prefix):
    before = tree(Path(server.base))
    prompt = {
        "1": {
            "class_type": "LoadSeed",
            "inputs": {"file": next(iter(NODES["LoadSeed"].define_schema().inputs[0].options))},
        },
        "2": {"class_type": "SaveSeed", "inputs": {"noise": ["1", 0], "filename_prefix": prefix}},
    }
    with pytest.raises(WorkflowError, match="filename_prefix"):
        client.run(prompt)
    seeds = [
        key for key in tree(Path(server.base)).keys() - before.keys() if key.endswith((".seed.safetensors", ".part"))
    ]
    assert not seeds
