"""Tests of the lists of files in the input and output folders.

The lists are complete, are cheap even with very many images, and contain only files that can be loaded.
"""

import os
from collections import Counter
from pathlib import Path

import folder_paths
import pytest

from chorus.host import folder_listing
from chorus.host.folder_listing import files_below
from chorus.nodes import NODES
from chorus.techniques.cas_dm.comfy_files import FILES as HEADS
from chorus.techniques.face_refiner.comfy_files import FILES as REFINERS
from chorus.techniques.face_refiner.comfy_pairs import PairFolder, pair_folders
from chorus.techniques.masked_tokens.comfy_token_files import FILES as TOKENS
from chorus.techniques.seed_select.comfy_files import FILES as SEEDS

LONG_AGO = 1_600_000_000
OUTPUT_FILES = (SEEDS, HEADS, REFINERS, TOKENS)
links = pytest.mark.skipif(os.name == "nt", reason="links need special rights on Windows")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's input and output folders, empty."""
    found = tmp_path / "input", tmp_path / "output"
    for folder in found:
        folder.mkdir()
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(found[0]))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(found[1]))
    return found


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """Counter of the directories below tmp_path that were read, by path."""
    counts, scandir, listdir = Counter(), os.scandir, os.listdir

    def counting(read):
        def counted(path="."):
            if Path(path).is_relative_to(tmp_path):
                counts[str(path)] += 1
            return read(path)

        return counted

    monkeypatch.setattr(os, "scandir", counting(scandir))
    monkeypatch.setattr(os, "listdir", counting(listdir))
    return counts


def touch(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def age(root):
    """Set the modification times of all directories below ``root`` to a time long ago."""
    for place, *_ in os.walk(root, followlinks=True):
        os.utime(place, (LONG_AGO, LONG_AGO))


def all_lists():
    """Options of every list that nodes of the pack offer, by node and input."""
    schemas = [node.define_schema() for node in NODES]
    return {
        (schema.node_id, entry.id): list(entry.options)
        for schema in schemas
        for entry in schema.inputs
        if getattr(entry, "options", None)
    }


def test_all_lists_together_read_each_directory_once(folders, reads):
    for folder in folders:
        for index in range(30):
            touch(folder / f"day {index}" / "ComfyUI_00001_.png")
    touch(folders[1] / "day 3" / "x_00001_.seed.safetensors")
    age(folders[0].parent)
    reads.clear()
    found = all_lists()
    assert f"day 3{os.sep}x_00001_.seed.safetensors [output]" in found["LoadSeed", "file"]
    assert len(reads) == 62 and set(reads.values()) == {1}
    all_lists()
    assert set(reads.values()) == {1}


def test_only_a_changed_directory_is_read_again(folders, reads):
    for index in range(5):
        touch(folders[1] / f"{index}" / "old.seed.safetensors")
    age(folders[1])
    files_below(str(folders[1]), ".safetensors")
    reads.clear()
    touch(folders[1] / "2" / "new.seed.safetensors")
    assert f"2{os.sep}new.seed.safetensors" in files_below(str(folders[1]), ".safetensors")
    assert list(reads) == [str(folders[1] / "2")]


def test_removed_files_and_folders_disappear(folders):
    old, other = (touch(folders[1] / name / "x.seed.safetensors") for name in ("a", "b"))
    age(folders[1])
    assert len(SEEDS.names()) == 2
    old.unlink()
    assert SEEDS.names() == [f"b{os.sep}x.seed.safetensors [output]"]
    other.unlink()
    other.parent.rmdir()
    assert SEEDS.names() == []


def test_file_saved_within_the_resolution_of_modification_times_is_listed(folders):
    """File systems round these times, so that a directory may look unchanged after a second file."""
    touch(folders[1] / "first.seed.safetensors")
    now = os.stat(folders[1]).st_mtime_ns
    assert len(SEEDS.names()) == 1
    touch(folders[1] / "second.seed.safetensors")
    os.utime(folders[1], ns=(now, now))
    assert len(SEEDS.names()) == 2


@pytest.mark.parametrize("files", OUTPUT_FILES, ids=lambda files: files.kind)
@links
def test_offered_file_behind_a_link_is_found(folders, tmp_path, files):
    disk = tmp_path / "other disk"
    touch(disk / "kept" / f"x{files.ending}")
    single = touch(disk / f"single{files.ending}")
    for folder in folders:
        (folder / "linked").symlink_to(disk / "kept", target_is_directory=True)
        (folder / f"single{files.ending}").symlink_to(single)
    names = [name for name in files.names() if "linked" in name or "single" in name]
    assert len(names) == (4 if files is not HEADS else 2)  # heads are not loaded from the input folder
    for name in names:
        assert files.validate(name) is True
        assert files.find(name).is_file()


@links
def test_offered_data_set_behind_a_link_is_found(folders, tmp_path):
    touch(tmp_path / "other disk" / "pairs" / "prompts.jsonl")
    (folders[1] / "linked").symlink_to(tmp_path / "other disk", target_is_directory=True)
    touch(folders[0] / "prompts.jsonl")  # the input folder itself is not offered as a data set
    touch(folders[0] / "mine" / "my prompts.jsonl")
    assert pair_folders() == ["linked/pairs [output]"]
    assert PairFolder.to_read("linked/pairs [output]").root == folders[1] / "linked" / "pairs"


@links
@pytest.mark.parametrize("inodes", [True, False])
def test_link_to_a_folder_above_is_not_followed_endlessly(folders, monkeypatch, inodes):
    """Without inode numbers, as on some network file systems, the operating system's limits for paths end the walk."""
    touch(folders[1] / "a" / "x.seed.safetensors")
    (folders[1] / "a" / "again").symlink_to(folders[1], target_is_directory=True)
    if not inodes:
        stat = os.stat

        def without_inode(path, **options):
            found = stat(path, **options)
            return os.stat_result((found.st_mode, 0, *found[2:]), {"st_mtime_ns": found.st_mtime_ns})

        monkeypatch.setattr(folder_listing.os, "stat", without_inode)
    names = files_below(str(folders[1]), ".seed.safetensors")
    assert f"a{os.sep}x.seed.safetensors" in names
    assert len(names) == 1 if inodes else len(names) < 200


@links
def test_broken_links_are_not_offered_until_their_target_exists(folders, tmp_path):
    (folders[1] / "later").symlink_to(tmp_path / "disk", target_is_directory=True)
    (folders[1] / "gone.seed.safetensors").symlink_to(tmp_path / "gone")
    age(folders[1])
    assert SEEDS.names() == []
    touch(tmp_path / "disk" / "x.seed.safetensors")
    assert SEEDS.names() == [f"later{os.sep}x.seed.safetensors [output]"]


@pytest.mark.parametrize("name", ["../input/x{} [output]", "{root}/input/x{} [output]", "a/../../input/x{}", "a\0{}"])
def test_names_that_lead_outside_are_not_found(folders, name):
    touch(folders[0] / "x.seed.safetensors")
    value = name.replace("{root}", str(folders[0].parent)).replace("{}", SEEDS.ending)
    with pytest.raises(ValueError, match=r"is not a seed file|there is no seed file"):
        SEEDS.find(value if "a/.." not in name else value + " [output]")


@links
def test_parent_of_a_link_is_not_reached(folders, tmp_path):
    """``link/..`` is the folder that contains the link. The operating system would use the parent of its target."""
    touch(tmp_path / "disk" / "secret.seed.safetensors")
    (tmp_path / "disk" / "kept").mkdir()
    (folders[1] / "link").symlink_to(tmp_path / "disk" / "kept", target_is_directory=True)
    with pytest.raises(ValueError, match="there is no seed file"):
        SEEDS.find("link/../secret.seed.safetensors [output]")
