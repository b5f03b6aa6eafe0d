"""Bundles: folders in which a stage trains on a machine without network, with only torch and numpy.

python run.py train-demo --bundle DIR general     write the bundle here; then copy it to the other machine
python DIR/train.py                               train on the other machine; can be stopped and resumed; copy DIR back
python run.py train-demo --collect DIR            import weights and state here
"""

import os
import shutil
from pathlib import Path

import torch

from . import snapshots, state
from .errors import RecipeError
from .lists import load_held_out
from .scenes import SIZES_ALONE, SIZES_PAIR
from .sprites import BUNDLE, write_bundle

LIMIT = 60e6  # bytes

SCRIPT = '''"""Trains the stage {stage} with the files of this folder. A new start resumes an interrupted training."""

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
    """Write a bundle with all files that ``stage`` needs, at most 60 MB; returns the number of bytes."""
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty; use a new or empty folder for the bundle")
    if not stage.torch_alone:
        raise RecipeError(
            f"{stage.name} cannot be bundled, because it needs ComfyUI or many sampled images;"
            " choose one of the long stages, such as general"
        )
    if missing := [name for name in stage.needs if not snapshots.facts(name)]:
        raise RecipeError(
            f"{stage.name} needs the weights of {' and '.join(missing)}; train the stages that make them first"
        )
    root = state.ROOT
    code = [*(root / "dev" / "recipes").rglob("*.py"), *(root / "demo").rglob("*.py")]
    code += [root / "demo" / "__init__.py", root / "dev" / "__init__.py"]
    code += (root / "demo" / "data").glob("*.json")
    for path in code:
        target = folder / "chorus" / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (folder / "chorus" / "__init__.py").write_text('"""The training code of ComfyUI-Chorus."""\n', encoding="utf-8")
    write_bundle(folder / "sprites.npz", (*SIZES_ALONE, *SIZES_PAIR, *load_held_out()["sizes"]))
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
        saved = folder / "state" / f"{stage.name}.pt"
        raise RecipeError(
            f"expected a bundle of at most {LIMIT / 1e6:.0f} MB, got {size / 1e6:.0f} MB for {stage.name};"
            f" delete {saved}, and the training resumes from the bundle's snapshot"
        )
    return size


def collect(folder, report=print):
    """Import the state files of a bundle, and its snapshots (as safetensors) if they are newer than those here."""
    folder = Path(folder).expanduser().resolve()
    if not (folder / "train.py").exists():
        raise RecipeError(f"{folder} has no train.py; use a folder that --bundle wrote")
    for path in sorted((folder / "snapshots").rglob("*.pt")):
        name = path.relative_to(folder / "snapshots").with_suffix("").as_posix()
        found = torch.load(path, weights_only=True, map_location="cpu")
        if int(found["facts"].get("step", 0)) <= int(snapshots.facts(name).get("step", -1)):
            continue
        snapshots.save(name, found["weights"], **{"style": "flat", **found["facts"]})
        report(f"{name}: weights of step {found['facts'].get('step')} imported")
    for path in sorted((folder / "state").glob("*")):
        if path.is_file() and not path.name.startswith("bank-") and path.suffix in (".pt", ".json"):
            state.folder().mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, state.folder() / f"{path.name}.part")
            os.replace(state.folder() / f"{path.name}.part", state.folder() / path.name)
            report(f"{path.name}: state imported")
