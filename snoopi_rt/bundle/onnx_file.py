"""What must be known about an ONNX file without the onnx package: the external files it reads, and the number of its token embeddings.

Parses the protobuf wire format only where tensors can be; tensor contents are skipped, not read.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from snoopi_rt.errors import BundleError
from snoopi_rt.files import open_regular, reason

# Message -> field number -> nested message, as in onnx.proto.
NESTED = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}

PAGE, MAX_NAME = 2**16, 2**20
"""Bytes that are read at once, and of the name of a file, an operator or a tensor."""
KEEPS_IDS = frozenset({"Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze", "Where"})
"""Operators whose outputs are still token ids."""
KEEPS_ROWS = frozenset({"Cast", "DequantizeLinear", "Identity"})
LOOKS_UP = frozenset({"Gather", "GatherBlockQuantized"})


def external_data(path: Path) -> list[str]:
    """The names of the files that the ONNX file's tensors refer to. Raises BundleError if it is not an ONNX file."""
    with _opened(path) as data:
        return sorted(set(_locations(data, "model", 0, len(data))))


def embedded_tokens(path: Path) -> int | None:
    """The number of token ids with embeddings: the rows of the smallest table in which the graph looks up its input `ids`.

    None if there is no such table. Raises BundleError if it is not an ONNX file.
    """
    with _opened(path) as data:
        graph = next(((begin, end) for field, begin, end in _fields(data, 0, len(data)) if field == 7), (0, 0))
        nodes, rows = [], {}
        for field, begin, end in _fields(data, *graph):
            if field == 1:
                nodes.append(_node(data, begin, end))
            elif field == 5:
                name, dims = _tensor(data, begin, end)
                rows[name] = dims[0] if len(dims) > 1 else None
        id_tensors, sizes = {"ids"}, []
        for operator, inputs, outputs in nodes:
            if operator in LOOKS_UP and inputs[1] in id_tensors and (count := rows.get(inputs[0])) is not None:
                sizes.append(count)
            if operator in KEEPS_ROWS and inputs[0] in rows:
                rows[outputs[0]] = rows[inputs[0]]
            if operator in KEEPS_IDS and id_tensors.intersection(inputs):
                id_tensors.update(outputs)
        return min(sizes, default=None)


class _Bytes:
    """A file's bytes by position. They are read and not mapped: truncating a mapped file kills the process (SIGBUS)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        self._start, self._page = 0, b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, position: int) -> int:
        offset = position - self._start
        if not 0 <= offset < len(self._page):
            self._file.seek(position)
            self._start, self._page, offset = position, self._file.read(PAGE), 0
        return self._page[offset]

    def text(self, start: int, end: int) -> str:
        """The text between two positions. Raises ValueError if it is longer than MAX_NAME, or not UTF-8."""
        if end - start > MAX_NAME:
            raise ValueError("a name that is too long")
        self._file.seek(start)
        return self._file.read(end - start).decode()


@contextmanager
def _opened(path: Path) -> Iterator[_Bytes]:
    try:
        with open_regular(path) as file:
            data = _Bytes(file)
            if not len(data):
                raise ValueError("an empty file")
            yield data
    except OSError as error:
        raise BundleError(f"cannot read {path}: {reason(error)}") from error
    except (IndexError, RecursionError, ValueError) as error:
        raise BundleError(f"{path} is not an ONNX file") from error


def _node(data: _Bytes, start: int, end: int) -> tuple[str, list[str], list[str]]:
    """The operator, the inputs and the outputs of a node."""
    texts: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for field, begin, stop in _fields(data, start, end):
        if field in texts:
            texts[field].append(data.text(begin, stop))
    return texts[4][0], texts[1], texts[2]


def _tensor(data: _Bytes, start: int, end: int) -> tuple[str, list[int]]:
    """The name and the shape of a tensor."""
    name, dims = "", []
    for field, wire, begin, stop in _wires(data, start, end):
        if (field, wire) == (1, 0):
            dims.append(_varint(data, begin)[0])
        elif (field, wire) == (1, 2):
            while begin < stop:
                value, begin = _varint(data, begin)
                dims.append(value)
        elif field == 8:
            name = data.text(begin, stop)
    return name, dims


def _locations(data: _Bytes, message: str, start: int, end: int) -> Iterator[str]:
    for field, first, last in _fields(data, start, end):
        nested = NESTED[message].get(field)
        if nested == "entry":
            entry = {number: data.text(begin, stop) for number, begin, stop in _fields(data, first, last)}
            if entry.get(1) == "location":
                yield entry.get(2, "")
        elif nested is not None:
            yield from _locations(data, nested, first, last)


def _fields(data: _Bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (field number, begin, end) of every length-delimited field of one message."""
    return ((field, begin, stop) for field, wire, begin, stop in _wires(data, start, end) if wire == 2)


def _wires(data: _Bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (field number, wire type, begin, end) of every field of one message."""
    while start < end:
        tag, start = _varint(data, start)
        match tag & 7:
            case 0:
                _, stop = _varint(data, start)
            case 1:
                stop = start + 8
            case 2:
                length, start = _varint(data, start)
                stop = start + length
            case 5:
                stop = start + 4
            case wire:
                raise ValueError(f"unknown wire type {wire}")
        if stop > end:
            raise ValueError("a field that is longer than its message")
        yield tag >> 3, tag & 7, start, stop
        start = stop


def _varint(data: _Bytes, start: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, start
    raise ValueError("a number of more than ten bytes")
