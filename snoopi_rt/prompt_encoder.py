"""Prompts to text states, computed once: stored in the bundle, kept in memory, or on disk by the text variant's hash and the text rule."""

import hashlib
import io
import json
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from snoopi_rt.bundle.bundle import Bundle, File, Prompts, Variant
from snoopi_rt.bundle.manifest import require, text_rule
from snoopi_rt.bundle.tokenizer import Tokenizer
from snoopi_rt.cache import Cache
from snoopi_rt.engines.base import Engine, TensorSpec
from snoopi_rt.engines.messages import why
from snoopi_rt.errors import BundleError, InputError, OutputError
from snoopi_rt.files import reason
from snoopi_rt.runtime.inputs import States
from snoopi_rt.runtime.lazy_engine import LazyEngine

MAX_BYTES_IN_MEMORY = 64 * 2**20
"""Bytes of states that are kept in memory: 34 prompts of T5-XXL's 120 tokens, 284 of SD 1.5's 77. All others are on disk."""
STORED = "prompts.npz"
MAX_NAMED = 10
"""How many of the known prompts an error names."""


class Conditioning(str):
    """A prompt with its states, for one bundle: `Pipeline.prepare` makes it, and it may stand wherever a prompt does.

    states: the text encoder's outputs by name, float32, one prompt: (1, T, D) and the like. bundle_hash: SHA-256 of the bundle.json of
    the bundle that it is for.
    """

    states: States
    bundle_hash: str

    def __new__(cls, text: str, states: States, bundle_hash: str) -> Self:
        self = super().__new__(cls, text)
        self.states, self.bundle_hash = states, bundle_hash
        return self


class PromptEncoder:
    """The states of prompts, (1, T, D) and the like by output name; tokenizer and text encoder are opened when a prompt needs them.

    `variant` is the text encoder's, None if the bundle has none; `engine` is the name of that which runs it.
    """

    def __init__(self, bundle: Bundle, variant: Variant | None, open_engine: Callable[[], Engine], cache: Cache, engine: str = "") -> None:
        self._bundle, self._cache = bundle, cache
        self._encoder = LazyEngine(open_engine)
        self._outputs = {} if variant is None else {spec.name: spec for spec in variant.outputs}
        # Engines differ in the last bits, and images of one engine are not to depend on who drew before.
        self._key = "" if variant is None else json.dumps([variant.hash, asdict(bundle.text), engine])
        self._stored = {text: row for row, text in enumerate(bundle.prompts.texts if bundle.prompts else ())}
        self._kept: OrderedDict[str | bytes, States] = OrderedDict()
        self._bytes = 0
        self._stored_file: bytes | None = None
        # Opening takes long: meanwhile other threads get the prompts that are kept.
        self._lock = threading.Lock()

    def encode(self, prompt: str, truncate: bool = False) -> States:
        """The states, to be read only.

        Raises InputError (see Tokenizer; or a prompt that is not stored in a bundle without text encoder) and OutputError if one is NaN.
        """
        text = text_rule(prompt, self._bundle.text.lowercase)
        if text in self._stored:
            return self._remembered(text) or self._remember(text, read_prompt(self._bundle, self._stored[text], self._stored_file))
        return self.encode_ids(self._ids(text, truncate))

    def encode_ids(self, ids: np.ndarray) -> States:
        """The states of token ids (1, T) int64, to be read only. Raises OutputError if one is NaN."""
        key = ids.tobytes()
        return self._remembered(key) or self._remember(key, self._from_disk(ids) or self._compute(ids))

    def check(self, prompt: str, truncate: bool = False) -> None:
        """Returns for a prompt that can be encoded, else raises InputError as `encode` does."""
        text = text_rule(prompt, self._bundle.text.lowercase)
        if text not in self._stored:
            self._ids(text, truncate)

    def keep(self, prompt: str, truncate: bool = False) -> bool:
        """Sees to it that the prompt's states outlive this process; whether that took the text encoder.

        Raises what `encode` raises, and OutputError if the cache does not take them.
        """
        if text_rule(prompt, self._bundle.text.lowercase) in self._stored:
            return False
        ids = self._ids(prompt, truncate)
        if self._from_disk(ids) is not None:
            return False
        self._compute(ids)
        if self._from_disk(ids) is None:
            raise OutputError(f"prompt states cannot be kept in {self._cache.path}: {self._cache.problem() or 'is the disk full?'}")
        return True

    def open(self) -> None:
        """Opens and reads all that prompts need, so that no later one needs a file of the bundle. Raises BundleError, EngineError."""
        if self._bundle.prompts is not None:
            path = self._bundle.folder / self._bundle.prompts.file.path
            try:
                self._stored_file = path.read_bytes()
                self._bundle.check_again([self._bundle.prompts.file])
            except OSError as error:
                raise BundleError(f"cannot read {path}: {reason(error)}") from error
        if self._bundle.text.tokenizer is not None:
            with self._lock:
                _ = self._tokenizer
            self._encoder.open()

    def release(self) -> None:
        """Frees the text encoder until another prompt needs it."""
        self._encoder.release()

    def stop(self) -> None:
        """No prompt is encoded any more."""
        self._encoder.stop()

    def close(self, seconds: float) -> None:
        """Frees the text encoder for good, see LazyEngine."""
        self._encoder.close(seconds)

    def _ids(self, text: str, truncate: bool) -> np.ndarray:
        if self._bundle.text.tokenizer is None:
            known = list(map(repr, self._stored))
            more = f" and {len(known) - MAX_NAMED} more" if len(known) > MAX_NAMED else ""
            raise InputError(
                f"prompt {text!r} is not one of the {len(known)} that bundle {self._bundle.name!r} knows (it has no text encoder): "
                f"{', '.join(known[:MAX_NAMED])}{more}"
            )
        with self._lock:
            tokenizer = self._tokenizer
        return tokenizer(text, truncate)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._bundle.open_tokenizer()

    def _remembered(self, key: str | bytes) -> States | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _remember(self, key: str | bytes, states: States) -> States:
        with self._lock:
            if key in self._kept:  # another thread was quicker
                return self._kept[key]
            for value in states.values():
                value.setflags(write=False)  # callers of `prepare` get these very arrays
            self._kept[key] = states
            self._bytes += _bytes(states)
            while self._bytes > MAX_BYTES_IN_MEMORY and len(self._kept) > 1:
                self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return states

    def _compute(self, ids: np.ndarray) -> States:
        # Copied: an engine's own memory, such as pinned memory of a GPU, is not to be kept for hours.
        states = {name: np.array(value) for name, value in self._encoder(ids=ids).items()}
        for name, value in states.items():
            if name in self._outputs and not (self._outputs[name].fits(value) and len(value) == 1):
                raise BundleError(f"text_encoder gave {name!r} as {value.dtype} {value.shape}, not as its bundle promises")
            if not np.isfinite(value).all():
                provider = self._encoder.open().provider
                raise OutputError(f"text_encoder gave NaN or infinity in {name!r}: this variant does not work on engine {provider!r}")
            data = io.BytesIO()
            np.save(data, value, allow_pickle=False)
            self._cache.write("states", self._file(ids, name), data.getvalue())
        return states

    def _from_disk(self, ids: np.ndarray) -> States | None:
        states = {}
        for name, spec in self._outputs.items():
            data = self._cache.read("states", self._file(ids, name))
            try:
                states[name] = _array(data or b"")
            except ValueError:  # not there
                return None
            if not _fits(states[name], spec):
                return None
        return states

    def _file(self, ids: np.ndarray, name: str) -> str:
        return f"{hashlib.sha256(self._key.encode() + ids.tobytes()).hexdigest()}-{name}.npy"


def _bytes(states: States) -> int:
    return sum(value.nbytes for value in states.values())


def write_prompts(folder: Path, encoded: Mapping[str, States]) -> Prompts:
    """Writes the states of prompts (by the text after the text rule) into a bundle's folder; what its bundle.json says about them."""
    path = folder / STORED
    arrays: dict[str, Any] = {f"{row}.{name}": value for row, states in enumerate(encoded.values()) for name, value in states.items()}
    np.savez(path, **arrays)
    return Prompts(File.of(path), tuple(encoded))


def read_prompt(bundle: Bundle, row: int, data: bytes | None = None) -> States:
    """The states of the prompt in that place of `bundle.prompts`, out of the file's bytes if they are given.

    Raises BundleError if the file does not hold them.
    """
    assert bundle.prompts is not None
    path = bundle.folder / bundle.prompts.file.path
    if data is None:
        bundle.check_again([bundle.prompts.file])
    inputs = {spec.name: spec for spec in bundle.graphs["generator"][0].inputs}
    specs = {name: inputs[taken] for name, taken in _TAKEN.items() if taken in inputs}
    try:
        with open(path, "rb") if data is None else io.BytesIO(data) as file, zipfile.ZipFile(file) as arrays:
            states = {name: _array(_unpacked(arrays, f"{row}.{name}.npy")) for name in specs}
    except KeyError:
        raise BundleError(f"{path} does not hold the prompt {bundle.prompts.texts[row]!r}") from None
    except Exception as error:  # of zipfile and zlib: a damaged file ends in many of them
        raise BundleError(f"cannot read {path}: {why(error)}") from error
    fit = all(_fits(states[name], spec) for name, spec in specs.items()) and states["states"].shape[1] <= bundle.text.max_tokens
    require(fit, f"{path} does not hold the prompt {bundle.prompts.texts[row]!r} as the generator takes it")
    return states


_TAKEN = {"states": "prompt_states", "pooled": "prompt_pooled"}
"""What a text encoder gives, and the input of the generator that it is."""
_MAX_BYTES = 2**28
"""Bytes of the states of one prompt: those of the longest that any model takes have some millions."""


def _unpacked(file: zipfile.ZipFile, name: str) -> bytes:
    """One file of an archive. Raises ValueError if it is far too large, however small the archive is."""
    if file.getinfo(name).file_size > _MAX_BYTES:
        raise ValueError(f"{name} has more than {_MAX_BYTES} bytes")
    return file.read(name)


def _array(data: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file. Raises ValueError."""
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # of numpy, whose errors on damaged files are of any kind
        raise ValueError(why(error)) from error


def _fits(value: np.ndarray, spec: TensorSpec) -> bool:
    """Whether it is one prompt's, of the shape and dtype that are promised, and can be used."""
    return spec.fits(value) and len(value) == 1 and 0 not in value.shape and bool(np.isfinite(value).all())
