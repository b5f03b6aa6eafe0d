"""Files of torch and of pickle that hold more than weights, less, or something that would run when it is read."""

import functools
import io
import math
import os
import pickle
import random
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .mutations import ODD_NAMES, damaged_bytes, other_tensors


class Runs:
    """Unpickled, it calls ``function``."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(marker: Path) -> list[Runs]:
    """Each would make the file ``marker``, by another road."""
    touch = f"open({str(marker)!r}, 'w').close()"
    return [
        Runs(os.system, f"touch {marker}"),
        Runs(exec, touch),
        Runs(eval, touch),
        Runs(open, str(marker), "w"),
        Runs(subprocess.call, ["touch", str(marker)]),
        Runs(Path.touch, marker),
        Runs(os.mkdir, str(marker)),
    ]


def dangerous(rng: random.Random, weights: Mapping[str, Tensor], marker: Path) -> bytes:
    """A file that runs code where pickle's own loading reads it: bare, in torch's two formats, in a tar."""
    payload = rng.choice(payloads(marker))
    inside = rng.choice(
        [payload, {**weights, "x": payload}, OrderedDict(weights, x=[payload]), (payload, dict(weights))]
    )
    kind = rng.randrange(4)
    if kind == 0:
        return pickle.dumps(payload, protocol=rng.randrange(pickle.HIGHEST_PROTOCOL + 1))
    if kind == 1:
        return saved(inside)
    if kind == 2:
        return saved(inside, zipped=False)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            inner = pickle.dumps(payload, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(inner)
            archive.addfile(info, io.BytesIO(inner))
    return data.getvalue()


def saved(content, zipped: bool = True) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, _use_new_zipfile_serialization=zipped)
    return data.getvalue()


def rezipped(data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The same records with other bytes in them, each with a true checksum."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return made.getvalue()


def pth_case(rng: random.Random, weights: Mapping[str, Tensor], marker: Path) -> bytes:
    """A .pth that is damaged, lies, holds something else, or would run code."""
    kind = rng.randrange(13)
    zipped = rng.random() < 0.7
    if kind == 0:
        return dangerous(rng, weights, marker)
    if kind < 3:
        return damaged_bytes(rng, saved(dict(weights), zipped))
    if kind < 5:
        return saved(other_tensors(rng, weights), zipped)
    if kind == 5:
        return saved(other_content(rng, weights), zipped)
    if kind < 8:
        changed = dict(weights)
        changed[rng.choice(list(changed))] = strange(rng)
        return saved(changed, zipped)
    if kind == 8:  # a storage of another length than the pickle says
        where = rng.randrange(9)
        cut = rng.choice([lambda d: d[:-4], lambda d: d[:0], lambda d: d * 3, lambda d: d[:4]])
        return rezipped(saved(dict(weights)), lambda name, d: cut(d) if name.endswith(f"/data/{where}") else d)
    if kind == 9:
        level = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED])
        return rezipped(saved(dict(weights)), lambda name, d: d, level)
    if kind == 10:
        return bomb()
    # inside the pickle, which zip's checksum would protect
    seed = rng.random()

    def change(name: str, data: bytes) -> bytes:
        return damaged_bytes(random.Random(seed), data) if name.endswith("data.pkl") else data

    return rezipped(saved(dict(weights)), change)


@functools.cache
def bomb(size: int = 2**29) -> bytes:
    """A zip as torch writes it that unpacks to half a gigabyte of zeros."""
    zeros = saved({"model.1.weight": torch.zeros(1)})
    level = zipfile.ZIP_DEFLATED
    return rezipped(zeros, lambda name, data: bytes(size) if name.endswith("/data/0") else data, level)


def other_content(rng: random.Random, weights: Mapping[str, Tensor]):
    weights = dict(weights)
    module = nn.Linear(2, 2)
    nested = {"state_dict": weights}
    for _ in range(300):
        nested = {"a": nested}
    return rng.choice(
        [
            *(None, 3, "weights", [], {}, [weights], (weights,), {"state_dict": weights}, {"net": weights, "epoch": 3}),
            *(module, module.state_dict(), OrderedDict(weights), torch.zeros(3), nested, {1: torch.zeros(2)}, {(): 1}),
            *(
                {None: None},
                {**weights, 7: torch.zeros(2)},
                {**weights, "epoch": 200},
                {k: v.tolist() for k, v in weights.items()},
            ),
            {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in weights.items()},
            {f"module.{k}": v for k, v in weights.items()},
            {**weights, rng.choice(ODD_NAMES): None},
            dict.fromkeys(weights),
        ]
    )


def strange(rng: random.Random) -> Tensor | None:
    """A tensor of a kind that no weight is, some of them larger than any file."""
    one = torch.zeros(1)
    return rng.choice(
        [
            one.expand(10**6, 10**6),
            one.expand(10**5, 64, 7, 7),
            one.expand(2**20, 2**12, 3, 3),
            torch.empty(8, 3, 7, 7, device="meta"),
            torch.empty(10**7, 10**7, device="meta"),
            torch.zeros(8, 3).to_sparse(),
            torch.zeros(8, 3).to_sparse_csr(),
            torch.quantize_per_tensor(torch.ones(8, 3, 7, 7), 0.1, 0, torch.qint8),
            torch.zeros(8, 3, 7, 7, dtype=torch.complex64),
            torch.zeros(8, 3, 7, 7).mT,
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            torch.zeros(8, 3, 7, 7, requires_grad=True),
            torch.zeros(8, 3, 7, 7, dtype=torch.bool),
            torch.full((8, 3, 7, 7), math.nan),
            torch.zeros(1000)[7:8].expand(8, 3, 7, 7),
            torch.zeros(()),
            torch.tensor([]),
            None,
        ]
    )
