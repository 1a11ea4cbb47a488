"""The folder of a diffusers tokenizer to tokenizer.json, and the rule by which the runtime makes ids of a prompt with it."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from snoopi_rt.bundle import File, Text
from snoopi_rt.engines.base import EngineMissing, InputError
from snoopi_rt.files import write_whole

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

CLIP_TOKENS = 77


def clip_rule(folder: Path, out: Path) -> Text:
    """The rule of a CLIP tokenizer, which is written to the file `out`: every prompt is filled to 77 tokens with the tokenizer's pad.

    Raises InputError where the folder holds no such tokenizer.
    """
    tokenizer = clip_tokenizer(folder)
    return Text(_written(tokenizer, out), min(tokenizer.model_max_length, CLIP_TOKENS), lowercase=False, pad=tokenizer.pad_token_id)


def clip_tokenizer(folder: Path) -> "CLIPTokenizer":
    """The tokenizer in the folder; raises InputError where there is none."""
    from transformers import CLIPTokenizer

    if not _has(folder, "tokenizer.json") and not _has(folder, "vocab.json", "merges.txt"):
        raise InputError(f"{folder} is no CLIP tokenizer: it has neither tokenizer.json nor vocab.json and merges.txt")
    return CLIPTokenizer.from_pretrained(folder)


def t5_rule(folder: Path, out: Path, max_tokens: int) -> Text:
    """The rule of a T5 tokenizer, which is written to the file `out`: lower case, as PixArt's pipelines do it, and no padding.

    PixArt-alpha takes 120 tokens, PixArt-Sigma 300. Raises InputError where the folder holds no such tokenizer, EngineMissing where it
    can be read with sentencepiece only and that is not installed.
    """
    from transformers import T5Tokenizer

    if not _has(folder, "tokenizer.json"):
        if not _has(folder, "spiece.model"):
            raise InputError(f"{folder} is no T5 tokenizer: it has neither tokenizer.json nor spiece.model")
        if importlib.util.find_spec("sentencepiece") is None:
            raise EngineMissing(f"{folder / 'spiece.model'} is read with sentencepiece, which is not installed: pip install sentencepiece")
    return Text(_written(T5Tokenizer.from_pretrained(folder), out), max_tokens, lowercase=True)


def _has(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)


def _written(tokenizer: "PreTrainedTokenizerFast", out: Path) -> File:
    write_whole(out, tokenizer.backend_tokenizer.to_str().encode())
    return File.of(out)
