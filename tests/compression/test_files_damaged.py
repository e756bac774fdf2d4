"""Damaged, forged and foreign files: each is refused, and nothing is half loaded."""

from __future__ import annotations

import copy
import functools
import io
import operator
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from basisconv_kernels.compression.files import load, read_recipe, save
from basisconv_kernels.core.errors import ArchitectureError, FileFormatError

from .file_networks import (
    CONFIGS,
    REFUSALS,
    Small,
    bits,
    compressed,
    folded,
    joined,
    packed,
    parts,
    refused,
    snapshot,
    ternary,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# --- damaged and hostile files ----------------------------------------------------------------------------------------


def test_files_of_others(path):
    model = Small()
    for content, message in (
        (b"", "truncated or foreign: 0 bytes"),
        (b"PK\x03\x04" + bytes(100), "truncated or foreign: its first 8 bytes announce"),
        ((2**62).to_bytes(8, "little") + bytes(100), "announce a header of 4611686018427387904 bytes"),
        (packed(b"[]", b""), "its JSON must be an object"),
        (packed(b"\xff\xfe", b""), "its header is no UTF-8"),
        (packed(b"{" + b'"a":{' * 100_000, b""), "its JSON does not parse"),
        (packed(b'{"a":' + b"[" * 60 + b"]" * 60 + b"}", b""), "nested more than 40 deep"),
        (packed(b'{"a":1,"a":2}', b""), "names a key twice"),
        (packed(b'{"a":"\\ud800"}', b""), "surrogates not allowed"),
        (packed(b'{"a":NaN}', b""), "the number 'NaN', which is not finite"),
        (packed(b'{"a":1e999}', b""), "the number '1e999', which is not finite"),
        (packed(b'{"a":' + b"9" * 5000 + b"}", b""), "its JSON does not parse: Exceeds the limit"),
        (safetensors.torch.save(model.state_dict()), "basisconv_kernels did not write it"),
        (safetensors.torch.save(model.state_dict(), {"format": "pt"}), "basisconv_kernels did not write it"),
    ):
        path.write_bytes(content)
        refused(path, model, FileFormatError, message)
        with pytest.raises(FileFormatError, match=f"read_recipe: {re.escape(str(path))}: "):
            read_recipe(path)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    path.write_bytes(buffer.getvalue())
    refused(path, model, FileFormatError, "truncated or foreign")


def edited(content: bytes, target: str, value: Any) -> bytes:
    """The file with one value of its document replaced: "layers.0.stride" = value."""
    table, document, data = parts(content)
    *steps, last = (int(step) if step.isdigit() else step for step in target.split("."))
    place: Any = functools.reduce(lambda part, step: part[step], steps, document)
    place[last] = value
    return joined(table, document, data, digest=target != "sha256")


EDITS = {
    "newer": ("version", 2, "has format version 2, this package reads versions up to 1; install a newer package"),
    "version_bool": ("version", True, "version must be an int of at least 1, got True"),
    "version_zero": ("version", 0, "version must be an int of at least 1, got 0"),
    "digest": ("sha256", "0" * 64, "truncated or edited: its content does not have the digest that it states"),
    "no_digest": ("sha256", None, "sha256 must be 64 hexadecimal digits, got None"),
    "unknown_key": ("more", 1, "the recipe must hold exactly layers, graphs, shared"),
    "layers": ("layers", {}, "layers must be a list"),
    "kind": (
        "layers.0.kind",
        "hexagonal_conv2d",
        "'hexagonal_conv2d', which this package does not know: a newer package",
    ),
    "field": ("layers.0.depth", 1, r"layer 'grouped' \(basis_conv2d\) must hold exactly"),
    "bool_for_int": ("layers.0.basis_channels", True, "basis_channels must be an int in 1..2147483647, got True"),
    "zero": ("layers.0.basis_channels", 0, "basis_channels must be an int in 1"),
    "float_for_int": ("layers.0.groups", 2.0, "groups must be an int in 1"),
    "int_for_bool": ("layers.0.compact", 1, "compact must be one of False, True, got 1"),
    "huge": ("layers.0.in_channels", 2**40, "in_channels must be an int in 1"),
    "stride": ("layers.0.stride", [2], "stride must be 2 ints of at least 1"),
    "padding": ("layers.0.padding", "full", "padding must be one of 'same', 'valid' or 2 ints"),
    "activation": ("layers.0.activation", "gelu", "activation must be one of null, 'relu', 'relu6', got 'gelu'"),
    "norm": ("layers.0.basis_norm", {"eps": -1}, "basis_norm must be one of null or {eps: a number"),
    "name_twice": ("layers.0.names", ["mix"], "two entries of the recipe have the same name"),
    "names_empty": ("layers.0.names", [], "must have a list of different names"),
    "order": ("layers.0.names", ["z"], "must be in the order of their first names"),
    "channels": ("layers.0.basis_channels", 4, r"'grouped.coefficients' must be \[12, 2\], got \[12, 3\]"),
    "divisible": ("layers.0.basis_channels", 5, "basis_channels must be divisible by groups = 2, got 5"),
    "shared": ("shared", {"head.bias": "stem.bias"}, "shared: 'head.bias' must be a later name of a stored tensor"),
}


@pytest.mark.parametrize(("target", "value", "message"), EDITS.values(), ids=EDITS)
def test_edited_recipes(target, value, message, path):
    save(compressed(), path)
    path.write_bytes(edited(path.read_bytes(), target, value))
    refused(path, Small(), FileFormatError, message)


GRAPH_EDITS = {
    "op": ("1.op", "run", FileFormatError, "graph '', node 1 must have one of the ops"),
    "later": ("1.args", [{"node": 1}], FileFormatError, "node 1: {'node': 1} is no argument"),
    "output": ("1.op", "output", FileFormatError, "inputs come first and one output last"),
    "keyword": ("1.kwargs", {"a=1)#": 1}, FileFormatError, "kwargs must have names"),
    "placeholder": ("0.target", "y", ArchitectureError, "its inputs are .* in the file"),
    "module": ("1.target", "training", ArchitectureError, "the model calls 'stem', the graph does not"),
    "operands": ("5.args", [], ArchitectureError, "torch.fx makes no program of it"),
}


@pytest.mark.parametrize(("target", "value", "error", "message"), GRAPH_EDITS.values(), ids=GRAPH_EDITS)
def test_edited_graphs(target, value, error, message, path):
    save(folded(), path)
    path.write_bytes(edited(path.read_bytes(), f"graphs.0.nodes.{target}", value))
    refused(path, Small(), error, message)


def test_edited_tables(path):
    save(compressed(), path)
    table, document, data = parts(path.read_bytes())
    for key, value, message in (
        ("dtype", "F4", "tensor 'head.bias' must have a dtype of F64, F32"),
        ("dtype", ["F32"], "tensor 'head.bias' must have a dtype of F64, F32"),
        ("shape", [True, 5], "must have a shape of sizes"),
        ("shape", [-5], "must have a shape of sizes"),
        ("shape", [0, 2**31, 2**31], "is too large"),
        ("shape", [6], "no intact safetensors file"),
        ("data_offsets", [0, 2**60], "no intact safetensors file"),
    ):
        other = copy.deepcopy(table)
        other["head.bias"][key] = value
        path.write_bytes(joined(other, document, data))
        refused(path, Small(), FileFormatError, message)
    path.write_bytes(joined(table, document, data + b"more"))
    refused(path, Small(), FileFormatError, "no intact safetensors file")
    del table["head.bias"]
    path.write_bytes(joined(table, document, data))
    refused(path, Small(), FileFormatError, "no intact safetensors file")


def damaged(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """The file with one ordinary damage: bits, a cut, a splice, its header's length, a swap."""
    at = dice.randrange(len(content))
    length = int.from_bytes(content[:8], "little")
    kind = dice.randrange(7)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + other[dice.randrange(len(other)) :]
    if kind == 2:
        return content[:at] + content[at + dice.randrange(1, 20) :]
    if kind == 3:
        return content[:at] + dice.randbytes(dice.randrange(1, 20)) + content[at:]
    if kind == 4:
        wrong = dice.choice([0, 1, length - 8, length + 1, length + dice.randrange(-50, 50), 2**31, 2**63, 2**64 - 1])
        return (wrong % 2**64).to_bytes(8, "little") + content[8:]
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 1, 3, 50])):
        place = dice.randrange(8 + length) if kind == 5 else dice.randrange(len(content))
        changed[place] ^= 1 << dice.randrange(8)
    return bytes(changed)


ODD_VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**30, 0.5, -1.5, 1e308, "", "x", "stem", "relu", "same",
    "float32", "torch.load", "getattr", "__class__", "\ud800", "a\nb", [], {}, [1], [0, 0], [1, 1], [[]], {"node": 0},
    {"node": 99}, {"tuple": []}, {"dict": {}}, {"slice": [None, 1]}, {"float": "nan"}, {"dtype": "torch.float16"},
    {"device": "cuda:7"},
)  # fmt: skip


def edited_json(value: Any, dice: random.Random) -> Any:
    """The JSON value with one edit somewhere inside, every place being as likely."""
    value = copy.deepcopy(value)
    containers, places = [value], []
    while containers:
        container = containers.pop()
        places += [(container, key) for key in (container if isinstance(container, dict) else range(len(container)))]
        inner = container.values() if isinstance(container, dict) else container
        containers += [child for child in inner if isinstance(child, (dict, list))]
    if not places:
        return dice.choice(ODD_VALUES)
    container, key = dice.choice(places)
    action, other = dice.random(), copy.deepcopy(operator.getitem(*dice.choice(places)))
    if action < 0.4:
        container[key] = copy.deepcopy(dice.choice(ODD_VALUES))
    elif action < 0.6:
        container[key] = other
    elif action < 0.7 and type(container[key]) is int:
        container[key] += dice.choice([-1, 1])
    elif action < 0.85:
        del container[key]
    elif isinstance(container, list):
        container.insert(key, other)
    else:
        container[dice.choice(["x", "kwargs", *container])] = container.pop(key)
    return value


def forged(content: bytes, _: bytes, dice: random.Random) -> bytes:
    """The file with edits of its recipe, its table or its data, and a digest that fits."""
    table, document, data = parts(content)
    kind = dice.random()
    for _ in range(dice.choice([1, 1, 2])):
        if (
            kind < 0.3
            and isinstance(document, dict)
            and isinstance(document.get("graphs"), list)
            and document["graphs"]
        ):
            document["graphs"] = edited_json(document["graphs"], dice)
        elif kind < 0.7:
            document = edited_json(document, dice)
        elif kind < 0.9:
            table = edited_json(table, dice)
        else:
            at = dice.randrange(len(data))
            data = dice.choice([data[:at], data[:at] + data[at + 1 :], data[:at] + dice.randbytes(1) + data[at + 1 :]])
    if not isinstance(table, dict):
        table = {"x": table}
    return joined(table, document, data)


@functools.cache
def originals() -> tuple[bytes, ...]:
    """Files of four networks: as compressed, folded, with BatchNorms between the stages, and with ternary codes."""
    networks = (compressed(), folded(), compressed(CONFIGS["norm"]), ternary())
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder) / str(number) for number in range(len(networks))]
        for name, network in zip(names, networks, strict=True):
            save(network, name)
        return tuple(name.read_bytes() for name in names)


def attack(path: Path, count: int, seed: int, mutate: Any) -> int:
    """Load ``count`` mutated files; how many of them were still good."""
    dice = random.Random(seed)
    contents = originals()
    torch.manual_seed(0)
    model = Small()
    good = 0
    for number in range(count):
        content = contents[number % len(contents)]
        mutated = mutate(content, dice.choice(contents), dice)
        path.write_bytes(mutated)
        start = time.process_time()
        target = copy.deepcopy(model)
        untouched = snapshot(target)
        try:
            told = read_recipe(path)
            result = load(path, target)
        except REFUSALS:
            result = None
        assert time.process_time() - start < 10
        if result is None:
            assert snapshot(target) == untouched
            continue
        # Still good: what was loaded is what the file says, to the last bit.
        good += 1
        table, _, data = parts(mutated)
        state = result.state_dict()
        assert all(bits(state[name]) == data[slice(*entry["data_offsets"])] for name, entry in table.items())
        save(result, path)
        assert {**read_recipe(path), "bytes": 0} == {**told, "bytes": 0}
    return good


def test_damaged_files(path):
    for content in originals():
        path.write_bytes(content)
        load(path, Small())
    assert attack(path, 500, 0, damaged) <= 5  # a damage may leave a file as it was


def test_forged_files(path):
    good = attack(path, 400, 1, forged)
    assert 0 < good < 200


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 6))
def test_ten_thousand_files(path, seed):
    attack(path, 1250, seed, damaged)
    attack(path, 1250, seed, forged)
