"""The bytes of a model file: a safetensors file with one JSON document in its metadata, and a digest of the whole.

The layout is in docs/model_files.md. Everything is checked before anything is believed, and nothing is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from basisconv_kernels.core.errors import FileFormatError

KEY = "basisconv_kernels"  # of the metadata
VERSION = 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

MAX_HEADER_BYTES = 2**24
MAX_DEPTH = 40  # of brackets in JSON
MAX_ELEMENTS = 2**48  # of a tensor, empty dimensions counted as 1: PyTorch's stride arithmetic stays exact
NO_DIGEST = "0" * 64

_LENGTH = 8  # bytes of the header's length, at the start of the file


def encode(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file; equal arguments give equal bytes.

    Args:
        document: JSON values.
        tensors: contiguous, on the CPU, no two in the same memory, each of a dtype in ``DTYPES``.
    """
    stated = {"version": VERSION, "sha256": NO_DIGEST, **document}
    text = json.dumps(stated, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # One key alone: the library writes several in an order that changes from run to run.
    content = safetensors.torch.save(dict(tensors), {KEY: text})
    # Layer names may hold 64 zeros as well, but they come after the digest.
    start = content.index(NO_DIGEST.encode())
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:start] + digest + content[start + len(digest) :]


def decode(content: bytes, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Verify the bytes of a file and take them apart.

    Args:
        content: of the whole file.
        source: the file's name, for messages.

    Returns:
        the document without ``version`` and ``sha256``, and the tensors by name.

    Raises:
        FileFormatError: the bytes are not what ``encode`` of this version writes.
    """
    header = _header(content, source)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        refuse(source, f"holds no {KEY!r} in its metadata, so basisconv_kernels did not write it")
    document = parse_json(metadata[KEY], source)
    version = document.pop("version", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        refuse(source, f"version must be an int of at least 1, got {shown(version)}")
    if version > VERSION:
        refuse(
            source,
            f"has format version {version}, this package reads versions up to {VERSION}; install a newer package",
        )
    _check_digest(content, document.pop("sha256", None), source)
    table = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in table.items():
        _check_entry(name, entry, source)
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise FileFormatError(f"{source}: no intact safetensors file: {error}") from error
    return document, tensors


def parse_json(text: str, source: str) -> dict[str, Any]:
    """A JSON object of proper text, without duplicate keys, NaN, infinities or deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            refuse(source, "its JSON names a key twice")
        return found

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            refuse(source, f"its JSON holds the number {shown(number)}, which is not finite")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
        json.dumps(value, ensure_ascii=False).encode()  # a lone half of a surrogate pair is no text
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also integers of thousands of digits
        raise FileFormatError(f"{source}: truncated or edited: its JSON does not parse: {error}") from error
    if not isinstance(value, dict):
        refuse(source, f"its JSON must be an object, got {shown(value)}")
    if _depth(value) > MAX_DEPTH:
        refuse(source, f"its JSON is nested more than {MAX_DEPTH} deep")
    return value


def refuse(source: str, problem: str) -> NoReturn:
    """Raise the error of a file that cannot be read."""
    raise FileFormatError(f"{source}: {problem}")


def shown(value: Any) -> str:
    """A value in a message, cut short: a hostile file shall not fill the screen."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _depth(value: Any) -> int:
    """How deep a JSON value is nested; no recursion, so that any depth can be told."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [child for children in inner for child in children]
    return depth


def _header(content: bytes, source: str) -> dict[str, Any]:
    if len(content) < _LENGTH:
        refuse(source, f"truncated or foreign: {len(content)} bytes are less than the length that a file starts with")
    length = int.from_bytes(content[:_LENGTH], "little")
    if length > min(MAX_HEADER_BYTES, len(content) - _LENGTH):
        refuse(
            source,
            f"truncated or foreign: its first 8 bytes announce a header of {length} bytes; the file has "
            f"{len(content) - _LENGTH} more bytes, and {MAX_HEADER_BYTES} is the limit",
        )
    try:
        text = content[_LENGTH : _LENGTH + length].decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{source}: truncated, edited or foreign: its header is no UTF-8: {error}") from error
    return parse_json(text, source)


def _check_digest(content: bytes, digest: Any, source: str) -> None:
    """The digest is that of the file with zeros in its place."""
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        refuse(source, f"sha256 must be 64 hexadecimal digits, got {shown(digest)}")
    start = content.find(digest.encode())
    if start < 0:
        refuse(source, "edited: its digest is not written out in its header")
    hashed = hashlib.sha256(content[:start])
    hashed.update(NO_DIGEST.encode())
    hashed.update(memoryview(content)[start + len(digest) :])
    if hashed.hexdigest() != digest:
        refuse(source, "truncated or edited: its content does not have the digest that it states")


def _check_entry(name: str, entry: Any, source: str) -> None:
    """What the library itself would not refuse, or refuse by another kind of error."""
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        refuse(source, f"tensor {shown(name)} must have a dtype of {known}, got {shown(entry)}")
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        refuse(source, f"tensor {shown(name)} must have a shape of sizes, got {shown(shape)}")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS or len(shape) > MAX_DEPTH:
        refuse(source, f"tensor {shown(name)} is too large, shape {shown(shape)}")
