"""Hypothesis strategies for torch and pickle files that hold no weights, such as code that unpickling runs."""

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


class Payload:
    """Calls ``function`` when it is unpickled."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(marker: Path) -> list[Payload]:
    """Objects that create the file ``marker`` when they are unpickled, each in a different way."""
    touch = f"open({str(marker)!r}, 'w').close()"
    return [
        Payload(os.system, f"touch {marker}"),
        Payload(exec, touch),
        Payload(eval, touch),
        Payload(open, str(marker), "w"),
        Payload(subprocess.call, ["touch", str(marker)]),
        Payload(Path.touch, marker),
        Payload(os.mkdir, str(marker)),
    ]


@st.composite
def dangerous(draw, weights: Mapping[str, Tensor], marker: Path) -> bytes:
    """A file that runs code when unpickled: a plain pickle, or a pickle in a torch zip, an old torch file or a tar."""
    payload = draw(st.sampled_from(payloads(marker)))
    kind = draw(st.sampled_from(["pickle", "zip", "old", "tar"]))
    if kind == "pickle":
        return pickle.dumps(payload, protocol=draw(st.integers(0, pickle.HIGHEST_PROTOCOL)))
    if kind == "tar":
        return tarred(pickle.dumps(payload, protocol=2))
    inside = [payload, {**weights, "x": payload}, OrderedDict(weights, x=[payload]), (payload, dict(weights))]
    return saved(draw(st.sampled_from(inside)), zipped=kind == "zip")


def tarred(inner: bytes) -> bytes:
    """``inner`` in the tar format of the oldest torch versions."""
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
    """The zip file ``data`` with each record replaced by ``change(name, bytes)``, with valid checksums."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return result.getvalue()


def with_record(data: bytes, end: str, new: bytes) -> bytes:
    """The zip file ``data`` with ``new`` in place of the record whose name ends in ``end``."""
    return rezipped(data, lambda name, old: new if name.endswith(end) else old)


def record(data: bytes, end: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(end)]
        return archive.read(name)


def pth_files(weights: Mapping[str, Tensor], marker: Path) -> SearchStrategy[bytes]:
    """A .pth file that is damaged or inconsistent, holds content other than weights, or would run code."""
    weights = dict(weights)
    whole, old = saved(weights), saved(weights, zipped=False)
    unusual_weights = st.tuples(st.sampled_from(sorted(weights)), unusual_tensors()).map(
        lambda pair: {**weights, pair[0]: pair[1]}
    )
    contents = mixed((2, other_tensors(weights)), (1, other_content(weights)), (2, unusual_weights))
    storages = [f"/data/{number}" for number in range(min(9, len(weights)))]
    # cases with a storage whose length differs from the size in the pickle
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
        (1, st.builds(zip_bomb)),
        # damage in the pickle with a valid zip checksum
        (2, damaged(record(whole, "data.pkl")).map(lambda data: with_record(whole, "data.pkl", data))),
    )


@functools.cache
def zip_bomb(size: int = 2**29) -> bytes:
    """A torch zip that unpacks to half a gigabyte of zeros."""
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


def unusual_tensors() -> SearchStrategy[Tensor | None]:
    """Tensors of kinds that no network has as weights, some with huge shapes."""
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
