"""Everything that the pack saves, in sizes that take time to write, and a process that is killed while it saves."""

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

from chorus.techniques.cas_dm.comfy_files import SUFFIX, head_files, read_head, save_head
from chorus.techniques.cas_dm.network import CasDMHeadConfig, HeadFacts, new_head, to_file
from chorus.techniques.face_refiner.comfy_files import load_refiner, refiner_files, save_refiner
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
    """``save(prefix)`` writes one more; ``offered()`` are the names that its loader's node shows; ``load(name)`` reads one."""

    save: Callable[[str], object]
    offered: Callable[[], list[str]]
    load: Callable[[str], object]
    folder: bool = False  # takes a folder for a prefix


def small_head():
    config = CasDMHeadConfig(channels=4, widths=(64, 64), embedding=64)
    return new_head(
        config, HeadFacts(latent_format="SD15", prediction="eps", cfg=3.0), torch.Generator().manual_seed(0)
    )


def savers(large: bool) -> dict[str, Saver]:
    """By node. ``large``: some megabytes each, else as little as there can be."""
    side = 768 if large else 4
    head = to_file(small_head())
    network = FaceRefinerNet(
        RefinerConfig(widths=(128, 128) if large else (8, 8), blocks=(1, 1)), comfy.ops.manual_cast
    )
    for weight in network.parameters():
        weight.data.normal_(std=0.02)
    refiner = wrap("tiny", network.eval().requires_grad_(False), {"size": "32"})
    pair = LoraWeights(torch.randn(4, side * side // 4), torch.randn(8, 4), 2.0)
    picture = torch.rand(1, side // 2, side // 2, 3)
    seed = SeedNoise(torch.randn(1, 4, side, side), 7)
    ids = torch.randint(37, (1, side, side))
    return {
        "SaveSeed": Saver(lambda prefix: save_seed(seed, prefix), SEEDS.names, load_seed),
        "SaveCasDMHead": Saver(lambda prefix: save_head(*head, prefix), head_files, read_head),
        "SaveFaceRefiner": Saver(
            lambda prefix: save_refiner(refiner, prefix, {}),
            refiner_files,
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
            lambda folder: save_pairs(folder, [picture], [picture], ["a"], {}), pair_folders, load_pairs, folder=True
        ),
    }


def kill_while_saving(home: Path, kills: int, seed: int) -> dict:
    """Of each saver ``kills`` processes are killed while they save one file after the other.

    Then all that has a final name is loaded. Returns the counts, and what was wrong.
    """
    # where LoadMaskedTokenLora finds what SaveMaskedTokenLora wrote, as in a real host
    folder_paths.folder_names_and_paths["loras"] = ([str(home / "output/loras")], {SUFFIX})
    rng, found, wrong = random.Random(seed), {}, []
    for name, saver in savers(large=True).items():
        counts = found[name] = {"kills": 0, "loaded": 0, "left": 0}
        for number in range(kills):
            prefix = f"loras/{name}{number}" if not saver.folder else f"pairs/{number}"
            folder = home / "output" / (Path(prefix) if saver.folder else Path(prefix).parent)
            code = killed(saver, prefix, folder, rng)
            if code != -signal.SIGKILL:
                wrong.append(f"{name}: the process ended by itself, with {code}")
                continue
            counts["kills"] += 1
            left = list(folder.rglob("*.part"))
            counts["left"] += bool(left)
            folder_paths.filename_list_cache.clear()
            for offered in saver.offered():
                if ".part" in offered:
                    wrong.append(f"{name} offers {offered}")
            for offered in own(saver.offered(), prefix):
                try:
                    saver.load(offered)
                    counts["loaded"] += 1
                except Exception as error:
                    if not saver.folder or "0 whole pairs" not in str(error):
                        wrong.append(f"{name} does not load {offered}: {error!r}"[:400])
            finals = [path for path in folder.rglob("*") if path.is_file() and path not in left]
            if not saver.folder and len(finals) != len(own(saver.offered(), prefix)):
                wrong.append(f"{name} left {[path.name for path in finals]}")
            for path in [*left, *finals]:
                path.unlink(missing_ok=True)
    return {"savers": found, "wrong": wrong}


def own(offered: list[str], prefix: str) -> list[str]:
    last = prefix.rsplit("/", 1)[-1]
    return [
        name for name in offered if name in (prefix, prefix + MARK) or name.rsplit("/", 1)[-1].startswith(f"{last}_")
    ]


def killed(saver: Saver, prefix: str, folder: Path, rng: random.Random) -> int:
    """How a process ended that saved until it was killed: when its n-th file had been begun, some time later."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                saver.save(prefix)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    begun, part = rng.randrange(1, 4), rng.random() < 0.8
    wait = 0.0 if rng.random() < 0.3 else rng.random() * 0.008
    patience = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        names = [path.name for path in folder.rglob("*")] if folder.is_dir() else []
        parts, whole = (
            sum(n.endswith(".part") == is_part and n.endswith((".part", SUFFIX, ".png")) for n in names)
            for is_part in (True, False)
        )
        if (whole >= begun - 1 and (parts if part else whole >= begun)) or time.monotonic() > patience:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 1
