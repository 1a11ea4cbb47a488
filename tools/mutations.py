"""What `fuzz.py` does to inputs: bytes, JSON documents, ONNX graphs and PNG files, damaged by a seeded generator."""

import copy
import json
import struct
import zlib
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

TOKENS = (b"\0", b"\n", b"\r\n", b'"', b"'", b",", b"\t", b"[", b"}", b"\\", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"NaN", b"1e999", b"-1")
TEXTS = (
    "",
    " ",
    "\0",
    "a\nb",
    "../x",
    "/dev/zero",
    "\ud800",
    "é",
    "🦊",
    "\u202e",
    "nan",
    "1e5",
    "0x10",
    "a red fox",
    "a " * 100,
    "a" * 40_000,
)
NUMBERS = (0, 1, -1, 7, 2**15, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, -(2**63), 10**39, 10**400, 0.5, -0.0, 1e308, 5e-324)
NESTED: Any = json.loads("[" * 40 + "]" * 40)
ODD: tuple[Any, ...] = (*TEXTS, *NUMBERS, float("nan"), float("inf"), None, True, False, [], {}, [[]], {"a": 1}, NESTED)
OPERATORS = ("Identity", "Transpose", "Reshape", "Expand", "Slice", "Softmax", "MatMul", "Gather", "Loop", "Resize", "NoSuchOperator", "")


def damaged_bytes(random: Random, data: bytes) -> bytes:
    """The bytes after one to four changes."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        start = random.randrange(len(changed) + 1)
        end = min(len(changed), start + random.choice((1, 1, 2, 4, 16, 256)))
        match random.randrange(7):
            case 0 if end > start:
                changed[start] ^= 1 << random.randrange(8)
            case 1:
                changed[start:end] = random.randbytes(end - start)
            case 2:
                del changed[start:end]
            case 3:
                changed[start:start] = changed[start:end] * random.choice((1, 2, 100))
            case 4:
                changed[start:start] = random.choice(TOKENS)
            case 5:
                changed[start:end] = bytes([random.choice((0, 32, 128, 255))]) * random.choice((end - start, 5000))
            case 6 if random.random() < 0.3:
                del changed[start:]
    return bytes(changed)


def damaged_json(random: Random, document: Any) -> bytes:
    """The document as text after one to three changes of its values and keys, and now and then of its bytes."""
    document = copy.deepcopy(document)
    for _ in range(random.randint(1, 3)):
        _change(random, document)
    text = json.dumps(document, ensure_ascii=random.random() < 0.8 or "\\ud8" in json.dumps(document))
    if random.random() < 0.1 and ": " in text:  # one key twice
        key = random.choice(text.split('": ')[:-1]).rpartition('"')[2]
        text = text[:-1] + f', "{key}": {json.dumps(random.choice(ODD))}' + text[-1:]
    data = text.encode(errors="surrogatepass")
    return damaged_bytes(random, data) if random.random() < 0.25 else data


def _change(random: Random, document: Any) -> None:
    places = list(_places(document))
    if not places:
        return
    holder, key = random.choice(places)
    match random.randrange(7):
        case 0 | 1:
            holder[key] = copy.deepcopy(random.choice(ODD))
        case 2:
            del holder[key]
        case 3:
            other, name = random.choice(places)
            with_value = copy.deepcopy(other[name])
            holder[key] = with_value
        case 4 if isinstance(holder, dict):
            holder[random.choice((*TEXTS, key.upper()))] = holder.pop(key)
        case 5 if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        case _:
            value = holder[key]
            if isinstance(value, bool | None):
                holder[key] = not value
            elif isinstance(value, int | float):
                holder[key] = value + random.choice((-1, 1) if isinstance(value, int) else (-1, 0.5))
            elif isinstance(value, str):
                at = random.randrange(len(value) + 1)
                holder[key] = value[:at] + random.choice(TEXTS[:-2]) + value[at + random.randint(0, 1) :]


def _places(document: Any) -> Any:
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        items = list(holder.items() if isinstance(holder, dict) else enumerate(holder)) if isinstance(holder, dict | list) else []
        for key, value in items:
            yield holder, key
            waiting.append(value)


def damaged_graph(random: Random, model: onnx.ModelProto) -> bytes:
    """The ONNX model after one to three changes of its parts, or of its bytes."""
    if random.random() < 0.3:
        return damaged_bytes(random, model.SerializeToString())
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    names = [value.name for value in (*graph.input, *graph.output, *graph.initializer)] + [n for node in graph.node for n in node.output]
    for _ in range(random.randint(1, 3)):
        node = random.choice(graph.node)
        match random.randrange(9):
            case 0:
                node.op_type = random.choice((*OPERATORS, *(other.op_type for other in graph.node)))
            case 1 if node.input:
                node.input[random.randrange(len(node.input))] = random.choice((*names, "", "nowhere"))
            case 2:
                node.output[0] = random.choice((*names, ""))
            case 3 if graph.initializer:
                _change_weight(random, random.choice(graph.initializer))
            case 4:
                _change_shape(random, random.choice((*graph.input, *graph.output)))
            case 5 if node.attribute:
                attribute = random.choice(node.attribute)
                attribute.i, attribute.s = random.choice((-1, 0, 2, 99, 2**62)), random.choice((b"", b"linear", b"\xff"))
                attribute.ints[:] = random.choices((-1, 0, 1, 2, 3, 2**40), k=random.randint(0, 4))
            case 6:
                graph.node.remove(node)
                if random.random() < 0.7 or not graph.node:
                    graph.node.insert(random.randrange(len(graph.node) + 1), node)
            case 7 if random.random() < 0.3:
                changed.opset_import[0].version = random.choice((1, 7, 13, 22, 999, -1))
            case 8:
                value = random.choice((*graph.input, *graph.output))
                value.name = random.choice((*names, "x"))
    return changed.SerializeToString()


def _change_weight(random: Random, weight: onnx.TensorProto) -> None:
    match random.randrange(5):
        case 0:
            kind = np.dtype(np.int64 if weight.data_type == onnx.TensorProto.INT64 else np.float32)
            odd = (0, 1, -1, 2, 7, 2**40) if kind == np.int64 else (0, np.nan, np.inf, 1e38, -1e-30)
            shape = [size for size in weight.dims if 0 <= size < 2**16]
            weight.CopyFrom(numpy_helper.from_array(np.full(shape[:2], random.choice(odd), kind), weight.name))
        case 1:
            weight.dims[:] = random.choices((0, 1, 2, 7, 2**20, 2**40, -1), k=random.randint(0, 4))
        case 2:
            weight.data_type = random.randrange(25)
        case 3:
            weight.raw_data = damaged_bytes(random, weight.raw_data)
        case 4:
            weight.ClearField("raw_data")
            weight.data_location = onnx.TensorProto.EXTERNAL
            places = ("gone.data", "../x", "/etc/passwd", "tokenizer.json", "bundle.json", "", "\0")
            for key, value in ("location", random.choice(places)), ("offset", random.choice(("0", "-1", "99999999999", "x"))):
                entry = weight.external_data.add()
                entry.key, entry.value = key, value


def _change_shape(random: Random, value: onnx.ValueInfoProto) -> None:
    kind = value.type.tensor_type
    if random.random() < 0.3:
        kind.elem_type = random.randrange(20)
    elif kind.shape.dim:
        axis = random.choice(kind.shape.dim)
        axis.dim_value = random.choice((0, 1, 2, 3, 5, -1, 2**40))


def damaged_png(random: Random, data: bytes) -> bytes:
    """The PNG file after changes of its chunks, most of which get a right checksum again."""
    chunks, place = [], 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + size]])
        place += 12 + size
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(chunks))
        match random.randrange(6):
            case 0:
                chunks[at][1] = damaged_bytes(random, chunks[at][1])
            case 1:
                chunks[at][0] = random.choice((b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"IDAT", b"IHDR", b"iCCP", b"acTL", b"\0\0\0\0"))
            case 2 if len(chunks) > 1:
                del chunks[at]
            case 3:
                chunks.insert(at, list(random.choice(chunks)))
            case 4:
                text = random.choice((*TEXTS, "{" * 50)).encode(errors="surrogatepass")
                name = random.choice((b"snoopi_rt", b"prompt", b"seed", b"negative_scale", b"", b"x" * 90))
                kind, value = random.choice(
                    (
                        (b"tEXt", name + b"\0" + text),
                        (b"zTXt", name + b"\0\0" + zlib.compress(text * 500)),
                        (b"iTXt", name + bytes(5) + text),
                    )
                )
                chunks.insert(1, [kind, value])
            case 5:
                chunks[0] = [b"IHDR", struct.pack(">IIBBBBB", *(random.choice((0, 1, 16, 2**31 - 1)) for _ in "wh"), 8, 2, 0, 0, 0)]
    file = bytearray(data[:8])
    for kind, value in chunks:
        checksum = zlib.crc32(kind + value) if random.random() < 0.95 else random.randrange(2**32)
        size = len(value) if random.random() < 0.97 else random.choice((0, 2**31, len(value) + 1))
        file += struct.pack(">I", size) + kind + value + struct.pack(">I", checksum)
    return bytes(file)
