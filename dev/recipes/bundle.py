"""A folder in which a stage trains on a machine without network, with torch and numpy alone.

python run.py train-demo --bundle DIR general     write it here, copy it there
python DIR/train.py                               train there; stop and start as you like
python run.py train-demo --collect DIR            copy it back and take over weights and state
"""

import os
import shutil
from pathlib import Path

import torch

from . import snapshots, state
from .errors import RecipeError
from .scenes import SIZES_ALONE, SIZES_PAIR
from .sprites import BUNDLE, write_bundle

LIMIT = 60e6

SCRIPT = '''"""Trains {stage} of the demo world here: python train.py. Interrupt it at any time; it goes on where it was."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ["{sprites}"] = str(HERE / "sprites.npz")
os.environ["{variable}"] = str(HERE / "state")
os.environ["{snapshots}"] = str(HERE / "snapshots")
sys.path.insert(0, str(HERE))

from chorus.dev.recipes.__main__ import main  # noqa: E402

sys.exit(main(["{stage}", *sys.argv[1:]]))
'''


def write(stage, folder):
    """Everything that ``stage`` needs, below 60 MB; returns the bytes written."""
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty: give a new folder for the bundle")
    if not stage.torch_alone:
        raise RecipeError(
            f"{stage.name} needs ComfyUI or quick sampling and trains here; a bundle is for the long stages"
        )
    if missing := [name for name in stage.needs if not snapshots.facts(name)]:
        raise RecipeError(
            f"{stage.name} needs the weights of {' and '.join(missing)}: train what comes before it first"
        )
    root = state.ROOT
    code = [*(root / "dev" / "recipes").rglob("*.py"), *(root / "demo" / "emoji").rglob("*.py")]
    code += [
        root / "demo" / "__init__.py",
        root / "dev" / "__init__.py",
        *(root / "demo" / "emoji" / "data").glob("*.json"),
    ]
    for path in code:
        target = folder / "chorus" / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (folder / "chorus" / "__init__.py").write_text('"""The part of ComfyUI-Chorus that trains."""\n', encoding="utf-8")
    write_bundle(folder / "sprites.npz", (*SIZES_ALONE, *SIZES_PAIR, *held_out_sizes()))
    (folder / "state").mkdir()
    for name in (f"{stage.name}.pt", f"{stage.name}.json"):
        if (state.folder() / name).exists():
            shutil.copyfile(state.folder() / name, folder / "state" / name)
    for name in (*stage.needs, stage.name):
        if found := snapshots.load(name):
            path = folder / "snapshots" / f"{name}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            snapshots.write_plain(path, found[0], {"step": found[1]})
    script = SCRIPT.format(stage=stage.name, sprites=BUNDLE, variable=state.VARIABLE, snapshots=snapshots.PLAIN)
    (folder / "train.py").write_text(script, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LIMIT:
        kept = folder / "state" / f"{stage.name}.pt"
        raise RecipeError(
            f"the bundle of {stage.name} has {size / 1e6:.0f} MB, more than {LIMIT / 1e6:.0f}: delete {kept} from it to"
            " go on from the snapshot there"
        )
    return size


def held_out_sizes():
    from .lists import load_held_out

    return load_held_out()["sizes"]


def collect(folder, report=print):
    """Take over what a bundle has trained: its state files, and its snapshots as safetensors."""
    folder = Path(folder).expanduser().resolve()
    if not (folder / "train.py").exists():
        raise RecipeError(f"{folder} holds no train.py: give the folder that --bundle wrote")
    for path in sorted((folder / "snapshots").rglob("*.pt")):
        name = path.relative_to(folder / "snapshots").with_suffix("").as_posix()
        found = torch.load(path, weights_only=True, map_location="cpu")
        if int(found["facts"].get("step", 0)) <= int(snapshots.facts(name).get("step", -1)):
            continue
        snapshots.save(name, found["weights"], **{"style": "flat", **found["facts"]})
        report(f"{name}: weights of step {found['facts'].get('step')} taken over")
    for path in sorted((folder / "state").glob("*")):
        if path.is_file() and not path.name.startswith("bank-") and path.suffix in (".pt", ".json"):
            state.folder().mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, state.folder() / f"{path.name}.part")
            os.replace(state.folder() / f"{path.name}.part", state.folder() / path.name)
            report(f"{path.name}: state taken over")
