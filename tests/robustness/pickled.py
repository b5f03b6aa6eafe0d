"""Files of torch and of pickle that hold more than weights, less, or something that would run when it is read."""

import functools
import io
import math
import os
import pickle
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from .mutations import NAMES, damaged, mixed, other_tensors


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


@st.composite
def dangerous(draw, weights: Mapping[str, Tensor], marker: Path) -> bytes:
    """A file that runs code where pickle's own loading reads it: bare, in torch's two formats, in a tar."""
    payload = draw(st.sampled_from(payloads(marker)))
    kind = draw(st.sampled_from(["pickle", "zip", "old", "tar"]))
    if kind == "pickle":
        return pickle.dumps(payload, protocol=draw(st.integers(0, pickle.HIGHEST_PROTOCOL)))
    if kind == "tar":
        return tarred(pickle.dumps(payload, protocol=2))
    inside = [payload, {**weights, "x": payload}, OrderedDict(weights, x=[payload]), (payload, dict(weights))]
    return saved(draw(st.sampled_from(inside)), zipped=kind == "zip")


def tarred(inner: bytes) -> bytes:
    """In the oldest of torch's formats."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
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


def with_record(data: bytes, end: str, new: bytes) -> bytes:
    """``new`` in place of the record whose name ends so."""
    return rezipped(data, lambda name, old: new if name.endswith(end) else old)


def record(data: bytes, end: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(end)]
        return archive.read(name)


def pth_files(weights: Mapping[str, Tensor], marker: Path) -> SearchStrategy[bytes]:
    """A .pth that is damaged, lies, holds something else, or would run code."""
    weights = dict(weights)
    whole, old = saved(weights), saved(weights, zipped=False)
    strange_weights = st.tuples(st.sampled_from(sorted(weights)), strange()).map(
        lambda pair: {**weights, pair[0]: pair[1]}
    )
    contents = mixed((2, other_tensors(weights)), (1, other_content(weights)), (2, strange_weights))
    storages = [f"/data/{number}" for number in range(min(9, len(weights)))]
    # a storage of another length than the pickle says
    cuts = st.sampled_from([lambda d: d[:-4], lambda d: d[:0], lambda d: d * 3, lambda d: d[:4]])
    cut = st.tuples(st.sampled_from(storages), cuts).map(
        lambda pair: with_record(whole, pair[0], pair[1](record(whole, pair[0])))
    )
    levels = st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED])
    return mixed(
        (1, dangerous(weights, marker)),
        (2, st.sampled_from([whole, whole, old]).flatmap(damaged)),
        (5, st.tuples(contents, st.sampled_from([True, True, False])).map(lambda pair: saved(*pair))),
        (1, cut),
        (1, levels.map(lambda level: rezipped(whole, lambda name, data: data, level))),
        (1, st.builds(bomb)),
        # inside the pickle, which zip's checksum would protect
        (2, damaged(record(whole, "data.pkl")).map(lambda data: with_record(whole, "data.pkl", data))),
    )


@functools.cache
def bomb(size: int = 2**29) -> bytes:
    """A zip as torch writes it that unpacks to half a gigabyte of zeros."""
    zeros = saved({"model.1.weight": torch.zeros(1)})
    level = zipfile.ZIP_DEFLATED
    return rezipped(zeros, lambda name, data: bytes(size) if name.endswith("/data/0") else data, level)


def other_content(weights: dict[str, Tensor]) -> SearchStrategy:
    module = nn.Linear(2, 2)
    nested = {"state_dict": weights}
    for _ in range(300):
        nested = {"a": nested}
    others = st.sampled_from(
        [
            *(None, 3, "weights", [], {}, [weights], (weights,), {"state_dict": weights}, {"net": weights, "epoch": 3}),
            *(module, module.state_dict(), OrderedDict(weights), torch.zeros(3), nested, {1: torch.zeros(2)}, {(): 1}),
            *({None: None}, {**weights, 7: torch.zeros(2)}, {**weights, "epoch": 200}, dict.fromkeys(weights)),
            {k: v.tolist() for k, v in weights.items()},
            {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in weights.items()},
            {f"module.{k}": v for k, v in weights.items()},
        ]
    )
    return mixed((20, others), (1, st.sampled_from(NAMES).map(lambda name: {**weights, name: None})))


def strange() -> SearchStrategy[Tensor | None]:
    """A tensor of a kind that no weight is, some of them larger than any file."""
    one = torch.zeros(1)
    return st.sampled_from(
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
