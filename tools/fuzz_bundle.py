"""Damaged bundles and a damaged cache: the kinds of inputs of `fuzz.py` that are files of a bundle, or made of them."""

import io
import json
import shutil
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny_bundle
from fuzz_kinds import ASKED, ENGINES, PICTURE, Finding, Kind, refused, require_picture
from mutations import damaged_bytes, damaged_graph, damaged_json

from snoopi_rt.bundle.bundle import MANIFEST, Bundle
from snoopi_rt.bundle.tokenizer import Tokenizer
from snoopi_rt.cache import Cache
from snoopi_rt.errors import SnoopiError
from snoopi_rt.loading import load
from snoopi_rt.prompt_encoder import write_prompts


class Manifest(Kind):
    """bundle.json; what is asked is said in full, so that other defaults change nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.expected = self.draw()

    def judge(self, random: Random) -> str:
        data = damaged_json(random, self.manifest)
        if random.random() < 0.2:
            data = damaged_bytes(random, (json.dumps(self.manifest, indent=1)).encode())
        (self.bundle.folder / MANIFEST).write_bytes(data)
        try:
            with load(self.bundle.folder, "cpu") as pipe:
                picture, text = pipe.generate(**ASKED).images[0], pipe.bundle.text
        except SnoopiError as error:
            return refused(error, 1, 2)
        if text.pad is None:  # else every prompt is another
            require_picture(picture, self.expected, "a manifest that was accepted")
        return PICTURE


class Graphs(Kind):
    """The three ONNX files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.models = {graph: tiny_bundle.onnx_graph(graph) for graph in tiny_bundle.SPECS}

    def judge(self, random: Random) -> str:
        graph = random.choice(list(self.models))
        for name, model in self.models.items():
            if name != graph:
                onnx.save(model, self.bundle.folder / f"{name}.onnx")
        self.replace_file(f"{graph}.onnx", damaged_graph(random, self.models[graph]))
        try:
            self.draw(random.choice([*["cpu"] * 2, ENGINES[-1]]), seed=random.randrange(2))
        except SnoopiError as error:
            return refused(error, 1)
        return PICTURE


class Tokenizers(Kind):
    """tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.document = json.loads((self.bundle.folder / "tokenizer.json").read_text(encoding="utf-8"))

    def judge(self, random: Random) -> str:
        document = self.document
        if random.random() < 0.5:
            document = {**document, random.choice(["pre_tokenizer", "normalizer", "decoder", "model"]): self._part(random)}
        self.replace_file("tokenizer.json", damaged_json(random, document))
        try:
            self.draw(prompt=random.choice(("a red fox", "🦊 é", "a fox\0"[:5], "blue " * 50)))
        except SnoopiError as error:
            return refused(error, 1, 2)
        return PICTURE

    def _part(self, random: Random) -> dict[str, Any]:
        """A part of a tokenizer that this one does not have."""
        return random.choice(
            [
                {
                    "type": "Split",
                    "pattern": {"Regex": random.choice(("(a+)+", "[", "", "(?=a)"))},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "Replace", "pattern": {"String": random.choice(("", "a"))}, "content": random.choice(("", "xyz" * 50))},
                {
                    "type": "Precompiled",
                    "precompiled_charsmap": random.choice(("", "AAAA", "ALQCAACEAAAAAACAAQAAgMz8AgC4BQAAhyIAgMzkAgC4PQ")),
                },
                {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
                {"type": "FixedLength", "length": random.choice((0, 1, 2**40))},
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
                {"type": "Sequence", "pretokenizers": [], "normalizers": []},
                {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", random.choice(("b", "a", ""))]], "unk_token": "a"},
                {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]], "unk_id": random.choice((0, 7, -1)), "byte_fallback": True},
                {"type": "WordPiece", "vocab": {"a": 0, "##b": 5}, "unk_token": "[UNK]", "max_input_chars_per_word": 0},
            ]
        )


class StoredPrompts(Kind):
    """The .npz file with the states of prompts that are stored in a bundle."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        tokenizer = Tokenizer(self.bundle.folder / "tokenizer.json", 6, lowercase=True)
        texts = (ASKED["prompt"], ASKED["negative_prompt"])
        document = {**vars(self.bundle)}
        states = {text: tiny_bundle.encode(tokenizer(text)) for text in texts}
        document["prompts"] = write_prompts(self.bundle.folder, states)
        self.bundle = Bundle(**document).save(self.bundle.folder)
        self.manifest = json.loads((self.bundle.folder / MANIFEST).read_text(encoding="utf-8"))
        self.states, self.data = states, (self.bundle.folder / "prompts.npz").read_bytes()

    def judge(self, random: Random) -> str:
        data = damaged_bytes(random, self.data) if random.random() < 0.6 else self._other(random)
        self.replace_file("prompts.npz", data)
        try:
            self.draw()
        except SnoopiError as error:
            return refused(error, 1)
        return PICTURE

    def _other(self, random: Random) -> bytes:
        """A whole file with other arrays in it."""
        value: Any = next(iter(self.states.values()))["states"]
        odd = (
            value.astype(np.float64),
            value[:, :0],
            value[0],
            np.full_like(value, np.nan),
            np.repeat(value, 3, 2),
            np.zeros((1, 50_000, 4), np.float32),
            np.array(["text"]),
            np.array([[[{}]]], dtype=object),
            np.float32(3),
        )
        file = io.BytesIO()
        names = {
            f"{row}.{name}": random.choice((value, *odd)) for row in range(2) for name in random.choice((("states",), ("states", "x"), ()))
        }
        random.choice((np.savez, np.savez_compressed))(file, **names)
        return damaged_bytes(random, file.getvalue()) if random.random() < 0.3 else file.getvalue()


class CacheFiles(Kind):
    """What lies in the cache: with a whole bundle every damage is to be without effect. One of five has a seal that fits."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cache = Cache()
        self.expected = {engine: self.draw(engine) for engine in ENGINES}
        self.kept = {path: path.read_bytes() for path in self.cache.path.rglob("*") if path.is_file() and "locks" not in path.parts}

    def judge(self, random: Random) -> str:
        for path, data in self.kept.items():
            path.parent.mkdir(exist_ok=True)
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)
        engine, sealed = random.choice([*["cpu"] * 4, ENGINES[-1]]), random.random() < 0.2
        for _ in range(random.randint(1, 2)):
            path = random.choice(list(self.kept))
            kind, name = path.parts[len(self.cache.path.parts) :][:2]
            data = damaged_bytes(random, random.choice((self.kept[path], random.choice(list(self.kept.values())))))
            if sealed and kind != "engines":
                self.cache.write(kind, name, damaged_bytes(random, self.kept[path][:-32]))
            elif random.random() < 0.1:
                shutil.rmtree(path.parent, ignore_errors=True)
            elif path.parent.is_dir():
                path.write_bytes(data)
        try:
            picture = self.draw(engine)
        except SnoopiError as error:
            if sealed:
                return refused(error, 1)
            raise Finding(f"a damaged cache: {error}") from error
        if not sealed:
            require_picture(picture, self.expected[engine], "a damaged cache")
        return PICTURE
