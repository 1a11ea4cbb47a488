"""Which other files an ONNX file reads: its external data, found without the onnx package.

Walks the protobuf wire format only where tensors can be; tensor contents are skipped, not read.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from snoopi_rt.engines.base import BundleError

# Message -> field number -> message inside, as in onnx.proto.
INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def external_data(path: Path) -> list[str]:
    """The names of the files that the ONNX file's tensors point to. Raises BundleError where it is no ONNX file."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return sorted(set(_locations(data, "model", 0, len(data))))
    except (IndexError, RecursionError, ValueError) as error:
        raise BundleError(f"{path} is not an ONNX file") from error


def _locations(data: mmap.mmap, message: str, start: int, end: int) -> Iterator[str]:
    for field, first, last in _fields(data, start, end):
        inside = INSIDE[message].get(field)
        if inside == "entry":
            entry = {number: data[begin:stop].decode() for number, begin, stop in _fields(data, first, last)}
            if entry.get(1) == "location":
                yield entry.get(2, "")
        elif inside is not None:
            yield from _locations(data, inside, first, last)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (field number, begin, end) of every length-delimited field of one message."""
    while start < end:
        tag, start = _varint(data, start)
        match tag & 7:
            case 0:
                _, start = _varint(data, start)
            case 1:
                start += 8
            case 2:
                length, start = _varint(data, start)
                if start + length > end:
                    raise ValueError("a field that is longer than its message")
                yield tag >> 3, start, start + length
                start += length
            case 5:
                start += 4
            case wire:
                raise ValueError(f"unknown wire type {wire}")


def _varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := data[start]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        start += 1
    return value | byte << shift, start + 1
