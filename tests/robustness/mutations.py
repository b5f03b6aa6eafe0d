"""Hypothesis strategies for damaged, inconsistent and unrelated files."""

import copy
import json
import math
import pickle
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 132\n"
DEEP = 100_000  # nesting beyond any recursive parser
DTYPES = ("F64 F32 F16 BF16 F8_E5M2 F8_E4M3 F8_E8M0 F6_E2M3 F6_E3M2 F4 C64 I64 U64 I32 U32 I16 U16 I8 U8 BOOL").split()
DTYPE_NAMES = (
    "float64 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu float4_e2m1fn_x2 int64 int32 int16 int8 uint8 uint16"
    " bool complex64"
).split()
NAMES = [
    *("model", "model.", "model.1", "model.x.conv_block.1.weight", "model.².conv_block.1.weight", ".conv_block."),
    *(
        "x.filt",
        "filt",
        "model.99.filt",
        "down.",
        "down.9.0.conv1.weight",
        "transformer_layers.x",
        "module.",
        "x" * 3000,
    ),
    *("module.model.1.weight", "a.running_mean", "alpha", "x.alpha", "lora_A.weight", "te.lora_down.weight"),
    *("model.model.1." + "model.3." * 2000 + "weight", "encoder.down_blocks.7.resnets.0"),
]
TEXTS = [
    *(
        "nan",
        "-inf",
        "1e999",
        "-1",
        "1.5",
        "0",
        "00",
        "9" * 30,
        "9" * 5000,
        "٣",
        "²",
        "None",
        "null",
        "true",
        "ü" * 2000,
    ),
    *("[]", "{}", "[[]]", "[[1]]", "[[1, 2, 3]]", '[["a", "b"]]', '{"ab": 1}', '"', "[[0, NaN]]", "1" + "0" * 400),
    *("[" * DEEP, '{"a":' * DEEP, "[" + "9" * 400 + "]", "[[" + "9" * 400 + ", 1]]"),
]
SIZES = st.sampled_from([-1, 0, 1, 3, 2**31, 2**32, 2**62, 2**63, 2**64]) | st.integers()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
SPECIAL = st.sampled_from([10**400, 10**4, 2**31, 2**63, 1e300, "gelu", "4", [], {}, [[]], ["8"], [1, 2]])
ANYTHING = (
    SPECIAL
    | st.integers(-1, 9)
    | st.recursive(
        SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=4
    )
)


def mixed(*weighted: tuple[int, SearchStrategy]) -> SearchStrategy:
    """One of the strategies, with the given weights."""
    each = [strategy for weight, strategy in weighted for _ in range(weight)]
    return st.integers(0, len(each) - 1).flatmap(lambda k: each[k])


def damaged(data: bytes) -> SearchStrategy[bytes]:
    """``data`` with changed, removed or inserted bytes, mostly in the header at the start, or an unrelated file."""
    places = st.one_of(*(st.integers(0, min(n, len(data))) for n in (16, 400, 4000, len(data))))
    cuts = st.sampled_from([0, 1, 1, 2, 7, 8, 64, 1000, len(data)])
    edits = st.tuples(places, cuts, st.binary(max_size=64) | st.sampled_from([8, 1000]).map(bytes))

    def edited(edits: list[tuple[int, int, bytes]]) -> bytes:
        result = data
        for place, cut, new in edits:
            result = result[:place] + new + result[place + cut :]
        return result

    others = st.sampled_from([b"", POINTER, b"\0" * 64, pickle.dumps({"a": [1.0]}), b"<html>404</html>", b"PK\x03\x04"])
    changed = st.lists(edits, min_size=1, max_size=8).map(edited).filter(lambda result: result != data)
    return mixed((9, changed), (1, st.just(data * 2)), (1, st.binary(max_size=100)), (1, others))


def header_of(data: bytes) -> tuple[str, bytes]:
    """Header of a safetensors file, and the bytes after it."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:end].decode(), data[end:]


def with_header(header: bytes, rest: bytes) -> bytes:
    """A safetensors file with the given header and its correct length."""
    return struct.pack("<Q", len(header)) + header + rest


def wrong_length(data: bytes) -> SearchStrategy[bytes]:
    """A safetensors file with a wrong header length."""
    actual = struct.unpack("<Q", data[:8])[0]
    wrong = [0, 1, actual - 1, actual + 1, actual + 8, len(data), len(data) - 8, len(data) - 7, 10**8, 10**8 + 1]
    wrong += [2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
    numbers = st.sampled_from(wrong) | st.integers(0, 2**64 - 1)
    return numbers.filter(lambda number: number != actual).map(lambda number: struct.pack("<Q", number) + data[8:])


def wrong_header(data: bytes) -> SearchStrategy[bytes]:
    """A safetensors file whose header does not match its data or cannot be parsed."""
    text, rest = header_of(data)
    odd = ["[" * DEEP, '{"a":' * DEEP, "[]", "null", "3", '"a"', "{", "", '{"": {}}', "{}", text * 2, "\ufeff" + text]
    encoded = st.sampled_from(["utf-16", "utf-32", "utf-7"]).map(lambda kind: text.encode(kind))
    headers = mixed(
        (6, wrong_entry(json.loads(text))),
        (3, other_json(text).map(str.encode)),
        (1, st.sampled_from(odd).map(str.encode)),
        (1, encoded),
        (1, damaged(text.encode())),
    )
    return headers.map(lambda header: with_header(header, rest))


@st.composite
def wrong_entry(draw, header: Mapping[str, Any]) -> bytes:
    """A header in which one tensor has another dtype, shape or data offsets, or occurs twice."""
    names = sorted(set(header) - {"__metadata__"})
    name = draw(st.sampled_from(names))
    entry = dict(header[name])
    kind = draw(st.sampled_from(["dtype", "axis", "shape", "data_offsets", "twice"]))
    if kind == "dtype":
        entry["dtype"] = draw(st.sampled_from([*DTYPES, "f32", "float32", "X" * 5000, {"F32": 1}]))
    elif kind == "axis":
        place = draw(st.integers(0, len(entry["shape"])))
        entry["shape"] = [*entry["shape"][:place], draw(SIZES), *entry["shape"][place + 1 :]]
    elif kind == "shape":
        entry["shape"] = draw(st.sampled_from([[10**9, 0], [2**32, 2**32], [2**33, 2**31], [1] * 500, {}, [[1]]]))
    elif kind == "data_offsets":
        start, end = entry["data_offsets"]
        wrong = [[start, end + 4], [start - 4, end], [end, start], [0, 0], [0, 2**62], [2**64 - 8, 2**64 - 4], [0]]
        wrong += [[-4, end], [float(start), float(end)], [str(start), str(end)], [start, end, end], {"0": 1}]
        others = st.sampled_from(names).map(lambda other: header[other]["data_offsets"])
        entry["data_offsets"] = draw(st.sampled_from(wrong) | others)
    else:
        twice = f", {json.dumps(name)}: {json.dumps(header[draw(st.sampled_from(names))])}}}"
        return (json.dumps(header)[:-1] + twice).encode()
    return json.dumps({**header, name: entry}).encode()


def places_of(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a JSON tree."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from places_of(value)


@st.composite
def other_tree(draw, text: str) -> str:
    """JSON with one or two values, keys or types changed."""
    root = [json.loads(text)]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        node, key = draw(st.sampled_from(list(places_of(root))))
        kind = "value" if node is root else draw(st.sampled_from(["value", "value", "value", "gone", "name"]))
        if kind == "gone":
            node.pop(key)
        elif kind == "name" and isinstance(node, dict):
            node[draw(st.text(max_size=3) | st.just("x" * 300))] = node.pop(key)
        else:
            node[key] = copy.deepcopy(draw(ANYTHING))  # a copy, since the next change may modify it
    return json.dumps(root[0])


def other_json(text: str) -> SearchStrategy[str]:
    """JSON changed by ``other_tree``, or sometimes invalid JSON."""
    cut = st.integers(0, len(text)).map(lambda end: text[:end])
    return mixed((8, other_tree(text)), (1, st.sampled_from([*TEXTS, text * 2, f"[{text}]"]) | cut))


def other_metadata(metadata: Mapping[str, str]) -> SearchStrategy[dict[str, str]]:
    """Metadata with one entry removed or changed."""
    keys = st.sampled_from([*metadata, "other"])
    texts = st.sampled_from(TEXTS) | st.text(max_size=9)
    trees = [key for key, value in metadata.items() if value.startswith(("{", "["))]
    changed = [st.tuples(st.just(key), other_json(metadata[key])) for key in trees]
    put = st.one_of(st.tuples(keys, texts), *changed).map(lambda pair: {**metadata, pair[0]: pair[1]})
    return mixed((5, put), (1, keys.map(lambda gone: {k: v for k, v in metadata.items() if k != gone})))


@st.composite
def other_weight(draw, weight: Tensor) -> Tensor:
    """A tensor of another shape or dtype, or with an extreme or non-finite value."""
    kind = draw(st.sampled_from(["shape", "dtype", "value", "empty"]))
    if kind == "value" and weight.numel() and weight.is_floating_point():
        weight = weight.clone()
        value = draw(st.sampled_from([math.nan, math.inf, -math.inf, 3e38]) | st.floats(width=32))
        weight.view(-1)[draw(st.integers(0, weight.numel() - 1))] = value
        return weight
    if kind == "dtype":
        return cast(weight, draw(st.sampled_from(DTYPE_NAMES)))
    if kind == "empty" and weight.ndim:  # a huge shape without elements
        shape, axes = list(weight.shape), st.integers(0, weight.ndim - 1)
        shape[draw(axes)] = draw(st.sampled_from([10**5, 10**9, 2**31, 2**40]))
        shape[draw(axes)] = 0
        return torch.empty(shape, dtype=weight.dtype)
    shapes = [weight.reshape(-1), weight[None], weight[..., None], weight.reshape(1, 1, -1), torch.zeros(3)]
    if weight.ndim:
        shapes += [weight.transpose(0, -1), weight[:-1]]
    return draw(st.sampled_from(shapes))


@st.composite
def other_tensors(draw, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that a file can hold but that do not fit the network."""
    result, known = dict(tensors), st.sampled_from(sorted(tensors))
    name, names = draw(known), st.sampled_from(NAMES) | st.text(max_size=9)
    weight = result[name]
    kind = draw(st.sampled_from([*["weight"] * 5, "gone", "name", "more", "swapped", "many", "few"]))
    if kind == "weight":
        result[name] = draw(other_weight(weight))
    elif kind == "gone":
        del result[name]
    elif kind == "name":
        result[draw(names)] = result.pop(name)
    elif kind == "more":
        result[draw(names)] = torch.zeros(draw(st.lists(st.integers(0, 7), max_size=5)))
    elif kind == "swapped":
        other = draw(known)
        result[name], result[other] = result[other], weight
    elif kind == "many":
        pattern = draw(st.sampled_from([f"{name}.{{}}", "down.{}.0.x", "transformer_layers.{}.x"]))
        result |= {pattern.format(number): weight for number in range(draw(st.integers(1, 600)))}
    else:
        result = draw(st.sampled_from([{}, {name: weight}]))
    # safetensors does not save tensors that share memory
    return {key: value.contiguous().clone() for key, value in result.items()}


def cast(weight: Tensor, name: str) -> Tensor:
    """``weight`` in the named dtype. For dtypes without conversion, the bits of uint8 values are reinterpreted."""
    dtype = getattr(torch, name, torch.float16)  # old versions of torch lack some dtypes
    small = name.startswith(("float4", "float8_e8"))
    # a tensor without axes may have half a byte, which cannot be saved
    return torch.atleast_1d(weight).to(torch.uint8).view(dtype) if small else weight.to(dtype)


def save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with a sorted header, the same in every run."""
    text, rest = header_of(safetensors.torch.save(dict(tensors), dict(metadata) or None))
    header = json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return with_header(header.encode().ljust(len(text.encode())), rest)


def safetensors_files(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> SearchStrategy[bytes]:
    """A damaged, inconsistent or different safetensors file."""
    data = save(tensors, metadata)
    return mixed(
        (5, other_tensors(tensors).map(lambda changed: save(changed, metadata))),
        (3, other_metadata(metadata).map(lambda changed: save(tensors, changed))),
        (3, damaged(data)),
        (6, wrong_header(data)),
        (3, wrong_length(data)),
    )
