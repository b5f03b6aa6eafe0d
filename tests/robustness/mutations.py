"""Damage to files, drawn by a random.Random: the same draw makes the same file, so that a case can be repeated alone."""

import json
import math
import pickle
import random
import struct
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 132\n"
DEEP = 100_000  # brackets, more than any parser that calls itself can close
DTYPES = ("F64 F32 F16 BF16 F8_E5M2 F8_E4M3 F8_E8M0 F6_E2M3 F6_E3M2 F4 C64 I64 U64 I32 U32 I16 U16 I8 U8 BOOL").split()
ODD_DTYPES = [*DTYPES, "f32", "", "float32", "X" * 5000, None, 7, ["F32"], {"F32": 1}]
DTYPE_NAMES = (
    "float64 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu float4_e2m1fn_x2 int64 int32 int16 int8 uint8 uint16"
    " bool complex64"
).split()
ODD_SIZES = [-1, 0, 1, 3, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.5, math.nan, math.inf, "4", None, [2], True]
ODD_VALUES = [
    *(None, True, False, "", "abc", "\0", "4", -1, 0, 1, 2, 3, 7, 0.5, 1e-320, math.nan, math.inf, -math.inf),
    *(10**4, 2**31, 2**63, 10**30, 10**400, 1e300, [], {}, [None], [[]], {"a": 1}, [1, 2], "gelu", [0], ["8"]),
]
ODD_TEXTS = [
    *("", " ", "nan", "-inf", "1e999", "-1", "1.5", "0", "00", "9" * 30, "9" * 5000, "٣", "²", "None", "null", "true"),
    *("[]", "{}", "[[]]", "[[1]]", "[[1, 2, 3]]", '[["a", "b"]]', '{"ab": 1}', '"', "\0", "ü" * 2000, "[[0, NaN]]"),
    *("[" * DEEP, '{"a":' * DEEP, "[" + "9" * 400 + "]", "[[" + "9" * 400 + ", 1]]", "1" + "0" * 400),
]
ODD_NAMES = [
    *("", ".", "..", "0", "model", "model.", "model.1", "model.x.conv_block.1.weight", "model.².conv_block.1.weight"),
    *(".conv_block.", "x.filt", "filt", "model.99.filt", "down.", "down.9.0.conv1.weight", "transformer_layers.x"),
    *("module.", "module.model.1.weight", "a.running_mean", "alpha", "x.alpha", "lora_A.weight", "te.lora_down.weight"),
    *("x" * 3000, "ü", "\0", "model.model.1." + "model.3." * 2000 + "weight", "encoder.down_blocks.7.resnets.0"),
]


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flipped, cut, longer, or another file altogether."""
    data = bytearray(data)
    at = rng.randrange(len(data) + 1)
    span = rng.choice([1, 2, 7, 8, 64, 1000])
    kind = rng.randrange(12)
    if kind < 4:  # most where something is written that a reader obeys
        for _ in range(rng.choice([1, 1, 2, 8, 50])):
            place = rng.randrange(min(len(data), rng.choice([16, 400, 4000, len(data)])) or 1)
            data[place : place + 1] = bytes([rng.randrange(256)])
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        del data[at : at + span]
    elif kind == 6:
        data[at:at] = rng.randbytes(span)
    elif kind == 7:
        data[at : at + span] = bytes(span)
    elif kind == 8:
        data += rng.choice([b"\0", b"\n", rng.randbytes(span), bytes(data)])
    elif kind == 9:
        data[:at] = b""
    elif kind == 10:
        return rng.randbytes(rng.choice([1, 7, 8, 9, 100, 5000]))
    else:
        return rng.choice([b"", POINTER, b"\0" * 64, pickle.dumps({"a": [1.0]}), b"<html>404</html>", b"PK\x03\x04"])
    return bytes(data)


def lying_length(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose first number, the length of its header, is not true."""
    true = struct.unpack("<Q", data[:8])[0]
    lies = [0, 1, true - 1, true + 1, true + 8, len(data), len(data) - 8, len(data) - 7, 10**8, 10**8 + 1]
    lies += [2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
    return struct.pack("<Q", rng.choice(lies)) + data[8:]


def with_header(header: bytes, data: bytes) -> bytes:
    """``data`` behind another header, whose length is true."""
    true = struct.unpack("<Q", data[:8])[0]
    return struct.pack("<Q", len(header)) + header + data[8 + true :]


def lying_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else of the bytes behind it, or nothing that can be read."""
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    kind = rng.randrange(14)
    if kind < 2:
        entry["dtype"] = rng.choice(ODD_DTYPES)
    elif kind < 5:
        shape = entry["shape"] = list(entry["shape"])
        new = rng.choice([[], [0], [10**9, 0], [2**32, 2**32], [2**33, 2**31], None, "4", {}, [[1]], [1] * 500])
        if shape and rng.random() < 0.6:
            shape[rng.randrange(len(shape))] = rng.choice(ODD_SIZES)
        else:
            entry["shape"] = new
    elif kind < 8:
        start, end = entry["data_offsets"]
        lies = [[start, end + 4], [start - 4, end], [end, start], [0, 0], [0, 2**62], [2**64 - 8, 2**64 - 4], [0]]
        lies += [[-4, end], [float(start), float(end)], [str(start), str(end)], None, [], [start, end, end], {"0": 1}]
        entry["data_offsets"] = rng.choice([*lies, header[rng.choice(names)]["data_offsets"]])
    elif kind == 8:
        header["__metadata__"] = rng.choice([7, "a", [], None, {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}])
    elif kind == 9:
        entry.pop(rng.choice(list(entry)))
    elif kind == 10:
        header[rng.choice(names)] = rng.choice([None, 3, [], "F32", {}, {"dtype": "F32"}])
    elif kind == 11:
        text = json.dumps(header)
        name = json.dumps(rng.choice(names))
        twice = text[:-1] + f", {name}: {json.dumps(entry)}}}"
        return with_header(rng.choice([twice, text * 2, text + " " * 64, "\ufeff" + text]).encode(), data)
    elif kind == 12:
        odd = ["[" * DEEP, '{"a":' * DEEP, "[]", "null", "3", '"a"', "{", "", '{"": {}}', "{}"]
        return with_header(rng.choice(odd).encode(), data)
    else:
        return with_header(json.dumps(header).encode(rng.choice(["utf-16", "utf-32", "utf-7"])), data)
    return with_header(json.dumps(header).encode(), data)


def other_tensors(rng: random.Random, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that a whole file can hold, and that are not those of a network."""
    found = dict(tensors)
    name = rng.choice(list(found)) if found else "x"
    weight = found.get(name, torch.zeros(2))
    kind = rng.randrange(15)
    if kind == 0:
        del found[name]
    elif kind == 1:
        found[rng.choice(ODD_NAMES)] = found.pop(name)
    elif kind == 2:
        found[rng.choice(ODD_NAMES)] = torch.zeros(rng.choice([(), (0,), (1,), (2, 3), (1, 1, 1, 1), (4, 3, 7, 7)]))
    elif kind == 3:
        other = rng.choice(list(found))
        found[name], found[other] = found[other], weight
    elif kind in (4, 5):
        found[name] = cast(weight, rng.choice(DTYPE_NAMES))
    elif kind in (6, 7) and weight.numel() and weight.is_floating_point():
        weight = weight.clone()
        value = rng.choice([math.nan, math.inf, -math.inf, 3e38])
        weight.view(-1)[rng.randrange(weight.numel())] = value
        found[name] = weight
    elif kind in (8, 9):
        # no bytes at all, and sizes that would need gigabytes
        shape = list(weight.shape) or [1]
        for _ in range(rng.choice([1, 1, 2])):
            shape[rng.randrange(len(shape))] = rng.choice([10**5, 10**9, 2**31, 2**40])
        shape[rng.randrange(len(shape))] = 0
        found[name] = torch.empty(shape, dtype=weight.dtype) if _counted(shape) else torch.empty(0)
    elif kind == 10:
        found[name] = weight.reshape(rng.choice([(-1,), (1, *weight.shape), (*weight.shape, 1), (1, 1, -1)]))
    elif kind == 11:
        found[name] = weight.transpose(0, -1).contiguous() if weight.ndim else weight.reshape(1)
    elif kind == 12:
        found[name] = weight[:-1] if weight.ndim else torch.zeros(3)
    elif kind == 13:
        for number in range(rng.choice([1, 40, 600])):
            found[rng.choice([f"{name}.{number}", f"down.{number}.0.x", f"transformer_layers.{number}.x"])] = weight
    else:
        found = {} if rng.random() < 0.5 else {name: weight}
    # one file holds no memory twice
    return {key: value.contiguous().clone() for key, value in found.items()}


def _counted(shape: list[int]) -> bool:
    """Whether torch can reckon with these sizes."""
    return math.prod(max(size, 1) for size in shape) < 2**62


def cast(weight: Tensor, name: str) -> Tensor:
    """To a dtype; to those without arithmetic by taking whole numbers for their bits."""
    dtype = getattr(torch, name, torch.float16)  # an older torch knows fewer
    small = name.startswith(("float4", "float8_e8"))
    return weight.to(torch.uint8).view(dtype) if small else weight.to(dtype)


def other_metadata(rng: random.Random, metadata: Mapping[str, str]) -> dict[str, str]:
    found = dict(metadata)
    key = rng.choice([*found, "other"])
    kind = rng.randrange(6)
    if kind == 0:
        found.pop(key, None)
    elif kind < 3:
        found[key] = rng.choice(ODD_TEXTS)
    elif kind == 3:
        return {} if rng.random() < 0.2 else {**found, key: found.get(key, "")[: rng.randrange(9)]}
    else:
        structured = [k for k, v in found.items() if v.startswith(("{", "["))]
        key = rng.choice(structured or [key])
        found[key] = other_json(rng, found.get(key, "[]"))
    return found


def other_json(rng: random.Random, text: str) -> str:
    """JSON with another value, key or type somewhere in it; now and then no JSON at all."""
    if rng.random() < 0.12:
        return rng.choice([*ODD_TEXTS, text[: rng.randrange(len(text) + 1)], text + text, "[" + text + "]"])
    try:
        root = [json.loads(text)]
    except ValueError:
        return rng.choice(ODD_TEXTS)
    for _ in range(rng.choice([1, 1, 1, 2])):
        node = root
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            deeper = isinstance(node[key], (dict, list)) and node[key]
            if deeper and (node is root or rng.random() < 0.6):
                node = node[key]
                continue
            change = rng.randrange(8)
            if change == 0 and node is not root:
                node.pop(key)
            elif change == 1 and isinstance(node, dict):
                node[rng.choice(["", "x" * 300, "Ü"])] = node.pop(key)
            else:
                node[key] = rng.choice(ODD_VALUES)
            break
    return json.dumps(root[0])


def safetensors_case(rng: random.Random, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A damaged, lying or merely other file."""
    kind = rng.randrange(20)
    if kind < 5:
        tensors = other_tensors(rng, tensors)
    elif kind < 8:
        metadata = other_metadata(rng, metadata)
    data = safetensors.torch.save(dict(tensors), dict(metadata) or None)
    lies: list[Callable[[random.Random, bytes], Any]] = [damaged_bytes, lying_header, lying_header, lying_length]
    return data if kind < 8 else lies[min((kind - 8) // 3, 3)](rng, data)
