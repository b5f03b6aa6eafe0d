"""All kinds of files that the pack saves, optionally large ones, and processes that are killed while they save."""

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.ops
import folder_paths
import torch

from chorus.techniques.cas_dm.comfy_files import FILES as HEADS
from chorus.techniques.cas_dm.comfy_files import SUFFIX, read_head, save_head
from chorus.techniques.cas_dm.network import CasDMHeadConfig, HeadFacts, new_head, to_file
from chorus.techniques.face_refiner.comfy_files import FILES as REFINERS
from chorus.techniques.face_refiner.comfy_files import load_refiner, save_refiner
from chorus.techniques.face_refiner.comfy_model import wrap
from chorus.techniques.face_refiner.comfy_pairs import MARK, load_pairs, pair_folders, save_pairs
from chorus.techniques.face_refiner.networks.residual import FaceRefinerNet, RefinerConfig
from chorus.techniques.masked_tokens.comfy_lora_files import lora_files, read_lora, write_lora
from chorus.techniques.masked_tokens.comfy_token_files import FILES as TOKENS
from chorus.techniques.masked_tokens.comfy_token_files import load_tokens, save_ids
from chorus.techniques.masked_tokens.lora import Lora, LoraWeights
from chorus.techniques.masked_tokens.lora import from_file as lora_from_file
from chorus.techniques.masked_tokens.lora import to_file as lora_to_file
from chorus.techniques.seed_select.comfy_files import FILES as SEEDS
from chorus.techniques.seed_select.comfy_files import SeedNoise, load_seed, save_seed


@dataclass
class Saver:
    """The functions for one kind of file.

    ``save(prefix)`` writes a new file. ``offered()`` lists the file names that the loading node offers. ``load(name)``
    reads one of these files.
    """

    save: Callable[[str], object]
    offered: Callable[[], list[str]]
    load: Callable[[str], object]
    folder: bool = False  # ``save`` takes a folder instead of a prefix


def small_head():
    config = CasDMHeadConfig(channels=4, widths=(64, 64), embedding=64)
    return new_head(
        config, HeadFacts(latent_format="SD15", prediction="eps", cfg=3.0), torch.Generator().manual_seed(0)
    )


def savers(large: bool) -> dict[str, Saver]:
    """Savers by node id. Their files have a few megabytes if ``large``, else the minimal size."""
    side = 768 if large else 4
    head = to_file(small_head())
    network = FaceRefinerNet(
        RefinerConfig(widths=(128, 128) if large else (8, 8), blocks=(1, 1)), comfy.ops.manual_cast
    )
    for weight in network.parameters():
        weight.data.normal_(std=0.02)
    refiner = wrap("tiny", network.eval().requires_grad_(False), {"size": "32"})
    pair = LoraWeights(torch.randn(4, side * side // 4), torch.randn(8, 4), 2.0)
    image = torch.rand(1, side // 2, side // 2, 3)
    seed = SeedNoise(torch.randn(1, 4, side, side), 7)
    ids = torch.randint(37, (1, side, side))
    return {
        "SaveSeed": Saver(lambda prefix: save_seed(seed, prefix), SEEDS.names, load_seed),
        "SaveCasDMHead": Saver(lambda prefix: save_head(*head, prefix), HEADS.names, read_head),
        "SaveFaceRefiner": Saver(
            lambda prefix: save_refiner(refiner, prefix, {}),
            REFINERS.names,
            load_refiner,
        ),
        "SaveMaskedTokenLora": Saver(
            lambda prefix: write_lora(prefix, *lora_to_file(Lora({"a.to_q": pair}))),
            lora_files,
            lambda name: lora_from_file(*read_lora(name)),
        ),
        "SaveMaskedTokens": Saver(
            lambda prefix: save_ids(ids, {"codebook": 37, "mask_id": 38, "downscale": 8}, prefix, {}),
            TOKENS.names,
            load_tokens,
        ),
        "SaveTrainingPairs": Saver(
            lambda folder: save_pairs(folder, [image], [image], ["a"], {}), pair_folders, load_pairs, folder=True
        ),
    }


def kill_while_saving(home: Path, kills: int, seed: int) -> dict:
    """For each saver, kill ``kills`` processes that save one file after the other, and load every finished file.

    Returns the counts for each saver, and the errors.
    """
    # as in a real ComfyUI, LoadMaskedTokenLora reads the folder to which SaveMaskedTokenLora writes
    folder_paths.folder_names_and_paths["loras"] = ([str(home / "output/loras")], {SUFFIX})
    rng, results, errors = random.Random(seed), {}, []
    for name, saver in savers(large=True).items():
        counts = results[name] = {"kills": 0, "loaded": 0, "left": 0}
        for number in range(kills):
            prefix = f"loras/{name}{number}" if not saver.folder else f"pairs/{number}"
            folder = home / "output" / (Path(prefix) if saver.folder else Path(prefix).parent)
            code = killed(saver, prefix, folder, rng)
            if code != -signal.SIGKILL:
                errors.append(f"{name}: the process ended by itself with code {code}")
                continue
            counts["kills"] += 1
            left = list(folder.rglob("*.part"))
            counts["left"] += bool(left)
            folder_paths.filename_list_cache.clear()
            for offered in saver.offered():
                if ".part" in offered:
                    errors.append(f"{name} offers {offered}")
            for offered in with_prefix(saver.offered(), prefix):
                try:
                    saver.load(offered)
                    counts["loaded"] += 1
                except Exception as error:
                    if not saver.folder or "0 complete pairs" not in str(error):
                        errors.append(f"{name} does not load {offered}: {error!r}"[:400])
            finals = [path for path in folder.rglob("*") if path.is_file() and path not in left]
            if not saver.folder and len(finals) != len(with_prefix(saver.offered(), prefix)):
                errors.append(
                    f"{name} left files that its loading node does not offer: {[path.name for path in finals]}"
                )
            for path in [*left, *finals]:
                path.unlink(missing_ok=True)
    return {"savers": results, "errors": errors}


def with_prefix(offered: list[str], prefix: str) -> list[str]:
    last = prefix.rsplit("/", 1)[-1]
    return [
        name for name in offered if name in (prefix, prefix + MARK) or name.rsplit("/", 1)[-1].startswith(f"{last}_")
    ]


def killed(saver: Saver, prefix: str, folder: Path, rng: random.Random) -> int:
    """Exit code of a process that saves files until it is killed.

    It is killed a few milliseconds (at most 8) after it has started or finished one of its first three files.
    """
    child = os.fork()
    if child == 0:
        try:
            while True:
                saver.save(prefix)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    number, part = rng.randrange(1, 4), rng.random() < 0.8
    wait = 0.0 if rng.random() < 0.3 else rng.random() * 0.008
    deadline = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        names = [path.name for path in folder.rglob("*")] if folder.is_dir() else []
        parts, whole = (
            sum(n.endswith(".part") == is_part and n.endswith((".part", SUFFIX, ".png")) for n in names)
            for is_part in (True, False)
        )
        if (whole >= number - 1 and (parts if part else whole >= number)) or time.monotonic() > deadline:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 1
