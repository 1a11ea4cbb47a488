"""A prompt becomes ids at its real length, or an error that names tokens and limit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.bundle.tokenizer import Tokenizer, highest_id
from snoopi_rt.errors import BundleError, InputError


@pytest.fixture
def tokenizer(original: Bundle) -> Tokenizer:
    return Tokenizer(original.folder / "tokenizer.json", max_tokens=6, lowercase=True)


def test_special_tokens_are_added_and_nothing_is_padded_or_cut(tokenizer: Tokenizer) -> None:
    ids = tokenizer("a red fox")
    assert ids.dtype == np.int64
    assert ids.tolist() == [[0, 3, 4, 6, 1]]


def test_text_is_lowercased_only_where_the_rule_says(original: Bundle, tokenizer: Tokenizer) -> None:
    assert tokenizer("A RED Fox").tolist() == tokenizer("a red fox").tolist()
    exact = Tokenizer(original.folder / "tokenizer.json", max_tokens=6, lowercase=False)
    assert exact("a RED fox").tolist() == [[0, 3, 2, 6, 1]]


def test_an_over_long_prompt_names_tokens_and_limit(tokenizer: Tokenizer) -> None:
    assert tokenizer("a a a a").shape == (1, 6)
    with pytest.raises(InputError, match="prompt has 7 tokens, the limit is 6: shorten it, or truncate"):
        tokenizer("a a a a a")


def test_truncation_keeps_the_last_special_token(tokenizer: Tokenizer) -> None:
    assert tokenizer("a red fox a cat a cat", truncate=True).tolist() == [[0, 3, 4, 6, 3, 1]]


def test_outer_white_space_is_no_part_of_a_prompt(original: Bundle) -> None:
    from tokenizers import Tokenizer as Saved
    from tokenizers import pre_tokenizers

    path = original.folder.parent / "sees_white_space.json"
    saved = Saved.from_file(str(original.folder / "tokenizer.json"))
    saved.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    saved.save(str(path))
    tokenizer = Tokenizer(path, max_tokens=6, lowercase=True)
    assert tokenizer("a cat").tolist() == [[0, 3, 2, 7, 1]]
    assert tokenizer(" \tA cat\n").tolist() == [[0, 3, 2, 7, 1]]


def test_a_pad_fills_every_prompt_to_the_limit_and_a_cut_one_not_beyond(original: Bundle) -> None:
    tokenizer = Tokenizer(original.folder / "tokenizer.json", max_tokens=6, lowercase=True, pad=0)
    assert tokenizer("a cat").tolist() == [[0, 3, 7, 1, 0, 0]]
    assert tokenizer("a a a a").tolist() == [[0, 3, 3, 3, 3, 1]]
    assert tokenizer("a a a a cat", truncate=True).tolist() == [[0, 3, 3, 3, 3, 1]]


def test_text_that_is_not_unicode_is_an_input_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="prompt is not valid Unicode text"):
        tokenizer("a \udcff fox")


def no_special_tokens(document: dict[str, Any]) -> None:
    document["post_processor"]["special_tokens"] = {}


def no_charsmap(document: dict[str, Any]) -> None:
    document["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def no_length(document: dict[str, Any]) -> None:
    document["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


def no_unknown_token(document: dict[str, Any]) -> None:
    document["model"]["unk_token"] = "[NOT THERE]"


def nothing(document: dict[str, Any]) -> None:
    document.clear()


@pytest.mark.parametrize("damage", [no_special_tokens, no_charsmap, no_length, no_unknown_token, nothing])
def test_what_the_package_raises_and_its_panics_are_bundle_errors_of_one_line(
    damage: Callable[[dict[str, Any]], None], original: Bundle, tmp_path: Path
) -> None:
    document = json.loads((original.folder / "tokenizer.json").read_text(encoding="utf-8"))
    damage(document)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=r"^[^\n]*tokenizer.json is not a tokenizer: [^\n]+$"):
        Tokenizer(path, 6, True)("a green fox")


def test_a_token_around_every_prompt_counts_among_the_highest_ids(original: Bundle, tmp_path: Path) -> None:
    """An engine would read beyond its table, or fail at every prompt."""
    document = json.loads((original.folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [99]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    assert (highest_id(original.folder / "tokenizer.json"), highest_id(tmp_path / "tokenizer.json")) == (9, 99)


def test_a_prompt_without_a_token_is_an_input_error(original: Bundle, tmp_path: Path) -> None:
    document = json.loads((original.folder / "tokenizer.json").read_text(encoding="utf-8"))
    document |= {"post_processor": None, "normalizer": {"type": "Replace", "pattern": {"String": "fox"}, "content": ""}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", 6, True)
    assert tokenizer("a fox").tolist() == [[3]]
    with pytest.raises(InputError, match=r"^prompt 'fox' has no tokens$"):
        tokenizer("fox")
