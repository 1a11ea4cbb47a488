"""Prompts to token ids, by tokenizer.json and the bundle's text rule. Knows no model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from snoopi_rt.bundle.manifest import Instruction, Text, text_rule
from snoopi_rt.engines.messages import why
from snoopi_rt.engines.native import native_code
from snoopi_rt.errors import BundleError, InputError

MAX_SHOWN = 200
"""Characters of a prompt that an error shows."""


class PromptTooLong(InputError):
    """PromptTooLong(tokens, limit): a prompt with more tokens than the bundle supports."""

    text = "prompt"
    """Which text it is."""

    def with_remedy(self, remedy: str) -> str:
        """The message, with a remedy in the words of the caller's interface."""
        tokens, limit = self.args
        return f"{self.text} has {tokens} tokens, the limit is {limit}: shorten it, or {remedy}"

    def __str__(self) -> str:
        return self.with_remedy("truncate (--truncate on the command line)")


class Tokenizer:
    """The tokenizer.json at `path`, without the padding and truncation with which it may have been saved. Thread-safe."""

    def __init__(
        self, path: Path, max_tokens: int, lowercase: bool, pad: int | None = None, instruction: Instruction | None = None
    ) -> None:
        self._path, self._tokenizer = path, _opened(path)
        self.max_tokens, self._lowercase, self._pad = max_tokens, lowercase, pad
        self._instruction, self._known = "", []
        if instruction is not None:
            self._instruction = instruction.text
            with _errors(path):
                self._known = self._tokenizer.encode(instruction.text).ids[: instruction.tokens]

    @classmethod
    def of(cls, path: Path, text: Text) -> Self:
        """The tokenizer with all of a text rule."""
        return cls(path, text.max_tokens, text.lowercase, text.pad, text.instruction)

    def __call__(self, prompt: str, truncate: bool = False) -> np.ndarray:
        """The ids, int64 (1, T), including special tokens; with `pad` T is the limit, otherwise the prompt's length.

        `truncate` cuts to the limit but keeps a special token at the end. Of an instruction's ids only the first is included.
        Raises InputError for text that is not Unicode, has no tokens, or is beyond the limit; BundleError if the tokenizer fails.
        """
        text = text_rule(prompt, self._lowercase)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"prompt is not valid Unicode text: {prompt!a}") from error
        with _errors(self._path):
            encoding = self._tokenizer.encode(self._instruction + text)
        ids, limit, known = encoding.ids, self.max_tokens, len(self._known)
        if len(ids) <= known:
            raise InputError(f"prompt {prompt[:MAX_SHOWN]!r} has no tokens")
        if ids[:known] != self._known:
            raise InputError(
                f"prompt {prompt[:MAX_SHOWN]!r} cannot be distinguished from the instruction before it: begin it with another word"
            )
        ids = ids[: min(known, 1)] + ids[known:]
        if len(ids) > limit:
            if not truncate:
                raise PromptTooLong(len(ids), limit)
            last = encoding.special_tokens_mask[-1]
            ids = ids[: limit - last] + ids[len(ids) - last :]
        if self._pad is not None:
            ids += [self._pad] * (limit - len(ids))
        return np.array([ids], dtype=np.int64)


def highest_id(path: Path) -> int:
    """The highest id of the tokenizer.json at `path`, including added and special tokens. Raises BundleError."""
    tokenizer = _opened(path)
    with _errors(path):
        return max(*tokenizer.get_vocab(with_added_tokens=True).values(), *tokenizer.encode("").ids, 0, 0)


def _opened(path: Path) -> Any:
    import tokenizers

    with _errors(path):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turns the package's errors, plain exceptions and panics of its native code, into a BundleError of one line."""
    try:
        with native_code():
            yield
    except BaseException as error:
        # A panic is not an Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{path} is not a tokenizer: {why(error)}") from error
