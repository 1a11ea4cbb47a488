"""A diffusers tokenizer to tokenizer.json and the rule by which the runtime makes ids of a prompt."""

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snoopi_rt.bundle.bundle import File, Instruction, Text
from snoopi_rt.bundle.tokenizer import highest_id
from snoopi_rt.engines.messages import why
from snoopi_rt.errors import InputError, PackageMissing, how_to_install
from snoopi_rt.export.weights.text_files import check_file, read_json, read_text
from snoopi_rt.files import write_whole

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

CLIP_TOKENS = 77
SMALL_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""JSON objects of which transformers makes a tokenizer."""
_SPECIAL = re.compile(r"<[^ ]+>")


def clip_rule(folder: Path, out: Path, embedded: int) -> Text:
    """The rule of a CLIP tokenizer, which is written to the file `out`: every prompt is padded to 77 tokens.

    Raises InputError if the folder holds no such tokenizer, or one of more tokens than the `embedded` of its text encoder.
    """
    tokenizer = clip_tokenizer(folder)
    return Text(
        _written(tokenizer, folder, out, embedded),
        min(tokenizer.model_max_length, CLIP_TOKENS),
        lowercase=False,
        pad=tokenizer.pad_token_id,
    )


def clip_tokenizer(folder: Path) -> "CLIPTokenizer":
    """The CLIP tokenizer in the folder. Raises InputError if there is none."""
    from transformers import CLIPTokenizer

    if not _has(folder, "tokenizer.json") and not _has(folder, "vocab.json", "merges.txt"):
        raise InputError(f"{folder} is no CLIP tokenizer: it has neither tokenizer.json nor vocab.json and merges.txt")
    return _opened(CLIPTokenizer, folder)


def t5_rule(folder: Path, out: Path, max_tokens: int, embedded: int) -> Text:
    """The rule of a T5 tokenizer, which is written to the file `out`: lower case, as in PixArt's pipelines, and no padding.

    PixArt-alpha takes 120 tokens, PixArt-Sigma 300. Raises InputError as clip_rule does, PackageMissing if it needs
    sentencepiece, which is not installed.
    """
    from transformers import T5Tokenizer

    if not _has(folder, "tokenizer.json"):
        if not _has(folder, "spiece.model"):
            raise InputError(f"{folder} is no T5 tokenizer: it has neither tokenizer.json nor spiece.model")
        if importlib.util.find_spec("sentencepiece") is None:
            raise PackageMissing(
                f"{folder / 'spiece.model'} is read with sentencepiece, which is not installed: {how_to_install('export')}"
            )
    return Text(_written(_opened(T5Tokenizer, folder), folder, out, embedded), max_tokens, lowercase=True)


def gemma_rule(folder: Path, out: Path, max_tokens: int, embedded: int, instruction: str) -> Text:
    """The rule of a Gemma tokenizer, which is written to the file `out`: lower case, as SANA's pipelines do it, behind an instruction.

    Of the instruction's ids all but the last are known to the text encoder: with the last, a space, the prompt begins. Raises InputError as
    clip_rule does.
    """
    tokenizer = gemma_tokenizer(folder)
    known = Instruction(instruction, len(tokenizer(instruction).input_ids) - 1)
    return Text(_written(tokenizer, folder, out, embedded), max_tokens, lowercase=True, instruction=known)


def gemma_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in the folder; raises InputError if there is none."""
    from transformers import GemmaTokenizer

    if not _has(folder, "tokenizer.json"):
        raise InputError(f"{folder} is no Gemma tokenizer: it has no tokenizer.json")
    return _opened(GemmaTokenizer, folder)


def _opened(kind: Any, folder: Path) -> Any:
    """The tokenizer that transformers loads from the folder. The files are checked one by one first: its own errors name other causes."""
    for name in SMALL_FILES:
        if (folder / name).exists():
            read_json(folder / name)
    if (folder / "merges.txt").exists():
        _check_merges(folder / "merges.txt", folder / "vocab.json")
    if (folder / "spiece.model").exists():
        check_file(folder / "spiece.model")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder} is no {kind.__name__} that can be read: {why(error)}") from error


def _check_merges(merges: Path, vocabulary: Path) -> None:
    """Returns if the merges make every word of the vocabulary, else raises InputError: a truncated file would split words in silence."""
    pairs = [line.split(" ") for line in read_text(merges).splitlines() if line.strip() and not line.startswith("#version")]
    if wrong := [" ".join(pair) for pair in pairs if len(pair) != 2]:
        raise InputError(f"{merges} holds {wrong[0][:40]!r}, which is no pair to merge: fetch it again")
    made = {"".join(pair) for pair in pairs}
    words = read_json(vocabulary)
    if not words or not all(type(number) is int for number in words.values()):
        raise InputError(f"{vocabulary} is no vocabulary: it does not give each word a number; fetch it again")
    if lost := [word for word in words if len(word.removesuffix("</w>")) > 1 and word not in made and not _SPECIAL.fullmatch(word)]:
        raise InputError(
            f"{merges} is cut short: it cannot make {len(lost)} words of {vocabulary.name}, such as {lost[0]!r}; fetch it again"
        )


def _has(folder: Path, *names: str) -> bool:
    return all((folder / name).exists() for name in names)


def _written(tokenizer: "PreTrainedTokenizerFast", folder: Path, out: Path, embedded: int) -> File:
    write_whole(out, tokenizer.backend_tokenizer.to_str().encode())
    if max(highest := highest_id(out), tokenizer.pad_token_id or 0) >= embedded:
        raise InputError(
            f"the tokenizer in {folder} has token ids up to {highest}, its text encoder has embeddings for {embedded}: "
            "fetch both from one model"
        )
    return File.of(out)
