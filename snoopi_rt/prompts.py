"""Prompts to text states, computed once: kept in memory, and on disk by the text build's hash."""

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property

import numpy as np

from snoopi_rt.cache import Cache
from snoopi_rt.engines.base import Engine, OutputError
from snoopi_rt.tokenizer import Tokenizer

States = dict[str, np.ndarray]
IN_MEMORY = 256


class PromptEncoder:
    """Token ids to the text encoder's outputs, (1, T, D) and the like; the encoder is opened at the first prompt that is nowhere yet."""

    def __init__(
        self, open_tokenizer: Callable[[], Tokenizer], open_engine: Callable[[], Engine], names: tuple[str, ...], key: str, cache: Cache
    ) -> None:
        self._open_tokenizer, self._open_engine = open_tokenizer, open_engine
        self._names, self._key, self._cache = names, key, cache
        self._kept: OrderedDict[bytes, States] = OrderedDict()
        # Opening the encoder takes long: meanwhile other threads get the prompts that are kept.
        self._lock, self._opening = threading.Lock(), threading.Lock()

    def __call__(self, prompt: str, truncate: bool) -> States:
        """The states by output name, to be read only. Raises InputError (see Tokenizer) and OutputError where one is NaN."""
        with self._lock:
            tokenizer = self._tokenizer
        ids = tokenizer(prompt, truncate)
        with self._lock:
            states = self._kept.pop(ids.tobytes(), None)
        states = states or self._from_disk(ids) or self._compute(ids)
        with self._lock:
            self._kept[ids.tobytes()] = states
            if len(self._kept) > IN_MEMORY:
                self._kept.popitem(last=False)
        return states

    def close(self) -> None:
        """Frees the encoder, if it was opened."""
        if "_engine" in self.__dict__:
            self._engine.close()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._open_tokenizer()

    @cached_property
    def _engine(self) -> Engine:
        return self._open_engine()

    def _compute(self, ids: np.ndarray) -> States:
        with self._opening:
            engine = self._engine
        states = {name: np.asarray(value) for name, value in engine(ids=ids).items()}
        for name, value in states.items():
            if not np.isfinite(value).all():
                raise OutputError(f"text_encoder gave NaN or infinity in {name!r}: this build does not work on engine {engine.provider!r}")
            data = io.BytesIO()
            np.save(data, value, allow_pickle=False)
            self._cache.write("states", self._file(ids, name), data.getvalue())
        return states

    def _from_disk(self, ids: np.ndarray) -> States | None:
        states = {}
        for name in self._names:
            data = self._cache.read("states", self._file(ids, name))
            try:
                states[name] = np.load(io.BytesIO(data or b""), allow_pickle=False)
            except (EOFError, ValueError):  # not there, or cut short by a power cut
                return None
        return states

    def _file(self, ids: np.ndarray, name: str) -> str:
        return f"{hashlib.sha256(self._key.encode() + ids.tobytes()).hexdigest()}-{name}.npy"
