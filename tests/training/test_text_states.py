"""Prompts of any length and number to text states on disk, and back in any order."""

import json
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import CaptionEncoder, find_backbone
from snoopi_rt.export.training.prompt_files import read_prompts
from snoopi_rt.export.training.text_states import either, encode_prompts, joined, shuffled

PROMPTS = ["a cat", "a red dog on a mat", "fish", "a cat in the fog", "moon"]


@pytest.fixture
def encoder(tmp_path: Path) -> CaptionEncoder:
    """MiniLM's tokenizer, and for an encoder each id as a state of width 3; `.calls` counts how often it ran."""
    real = find_backbone("small").denoiser().caption_encoder(tmp_path, 8)
    calls = []

    def encode(prompts: list[Tensor]) -> list[Tensor]:
        calls.append(len(prompts))
        return [ids[..., None].float().expand(-1, -1, 3) for ids in prompts]

    made = CaptionEncoder(real.write_tokenizer, encode)
    object.__setattr__(made, "calls", calls)
    return made


def test_every_prompt_has_the_states_that_it_has_alone(tmp_path: Path, encoder: CaptionEncoder) -> None:
    together = encode_prompts(lambda: PROMPTS, "k", encoder, True, tmp_path / "all", shard=3)
    assert len(together) == len(PROMPTS) and together.first == PROMPTS
    for row, prompt in enumerate(PROMPTS):
        alone = encode_prompts(lambda prompt=prompt: [prompt], "k", encoder, True, tmp_path / str(row)).batch([0])
        batch = together.batch([4, row, -1])
        assert batch.mask is not None and alone.mask is not None
        assert torch.equal(batch.states[1][batch.mask[1]], alone.states[0][alone.mask[0]])
        assert (batch.states[1][~batch.mask[1]] == 0).all()
        assert int(batch.mask[2].sum()) == 2  # the empty prompt: [CLS] [SEP]


def test_states_are_computed_once_and_a_stopped_run_goes_on(tmp_path: Path, encoder: CaptionEncoder) -> None:
    def stopping() -> list[str]:
        yield from PROMPTS[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_prompts(stopping, "k", encoder, True, tmp_path / "s", shard=2)
    assert len(list((tmp_path / "s").glob("shard-*"))) == 2 and not (tmp_path / "s" / "index.json").exists()
    before = len(encoder.calls)
    encode_prompts(lambda: PROMPTS, "k", encoder, True, tmp_path / "s", shard=2)
    assert len(encoder.calls) == before + 1
    encode_prompts(lambda: PROMPTS, "k", encoder, True, tmp_path / "s", shard=2)
    assert len(encoder.calls) == before + 1


def test_two_runs_that_share_a_folder_compute_its_states_once(tmp_path: Path, encoder: CaptionEncoder) -> None:
    encode, others = encoder.encode, []

    def disturbed(prompts: list[Tensor]) -> list[Tensor]:
        if not others:
            others.append(Thread(target=encode_prompts, args=(lambda: PROMPTS, "k", encoder, True, tmp_path / "s")))
            others[0].start()
            others[0].join(0.2)  # waits for this run: without a lock it would be done by now
        return encode(prompts)

    states = encode_prompts(lambda: PROMPTS, "k", replace(encoder, encode=disturbed), True, tmp_path / "s")
    before = len(encoder.calls)
    others[0].join()
    assert len(encoder.calls) == before and len(states) == len(PROMPTS)


def test_states_of_other_prompts_are_refused_and_half_of_them_are_made_anew(tmp_path: Path, encoder: CaptionEncoder) -> None:
    encode_prompts(lambda: PROMPTS, "one", encoder, True, tmp_path / "s")
    with pytest.raises(InputError, match="states of other prompts"):
        encode_prompts(lambda: PROMPTS, "other", encoder, True, tmp_path / "s")
    (tmp_path / "s" / "index.json").unlink()
    anew = encode_prompts(lambda: ["moon"], "other", encoder, True, tmp_path / "s")
    assert torch.equal(anew.batch([0]).states, encode_prompts(lambda: ["moon"], "m", encoder, True, tmp_path / "m").batch([0]).states)


def test_long_prompts_are_cut_with_a_warning_and_none_is_an_error(tmp_path: Path, encoder: CaptionEncoder) -> None:
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than 8 tokens and were cut"):
        encode_prompts(lambda: ["a " * 20, "a a a a a a"], "k", encoder, True, tmp_path / "s")
    with pytest.raises(InputError, match="no prompt to train on"):
        encode_prompts(lambda: [], "k", encoder, True, tmp_path / "none")


def test_joined_batches_are_filled_to_the_longer_one(tmp_path: Path, encoder: CaptionEncoder) -> None:
    long = encode_prompts(lambda: PROMPTS, "k", encoder, True, tmp_path / "long").batch([1])
    short = encode_prompts(lambda: ["fish"], "k", encoder, True, tmp_path / "short").batch([0])
    for first, second in (long, short), (short, long):
        both = joined(first, second)
        assert both.states.shape == (2, long.states.shape[1], 3) and both.mask is not None
        assert both.mask.sum(1).tolist() == [int(batch.mask.sum()) for batch in (first, second)]
        for where, place in ((True, 0), (False, 1)):
            one = either(torch.tensor([where]), first, second)
            assert one.mask is not None and torch.equal(one.mask[0], both.mask[place])
            assert torch.equal(one.states[0], both.states[place])


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_an_epoch_has_every_prompt_once_in_an_order_of_its_own(count: int) -> None:
    epochs = [[shuffled(epoch * count + place, count, seed=7) for place in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count >= 16:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert [shuffled(place, count, seed=8) for place in range(count)] != epochs[0]
        # Neighbours are torn apart.
        near = sum(abs(a - b) == 1 for a, b in zip(epochs[0], epochs[0][1:], strict=False))
        assert near < count / 2


def test_prompts_are_read_from_every_format(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("\ufeffa cat\n# not this\n\n  a dog \n", "utf-8")
    rows = [{"caption": "a cat"}, {"prompt": "a dog", "caption": "not this", "license": 1}, {"text": " "}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.table({"text": ["a cat", "a dog", ""], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.CSV").write_text(",text,n\n0,a cat,1\n1,a dog,2\n2,,3\n")
    for kind in "txt", "jsonl", "parquet", "json", "CSV":
        assert list(read_prompts(tmp_path / f"a.{kind}")) == ["a cat", "a dog"], kind


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.doc", b"", "it is not one of .txt, .csv, .tsv, .json, .jsonl, .parquet"),
        ("a.csv", b"url,n\nx,1\n", "line 2 of .* has no text under prompt, caption, text"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("a.jsonl", b"{}\n", "line 1 of .* has no text under prompt, caption, text"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2 of .* has no text"),
        ("a.jsonl", b"{", "line 1 of .*: not a JSON object"),
        ("a.parquet", b"PAR1", "it is not a valid Parquet file"),
        ("none.txt", None, "cannot read .*none.txt: No such file"),
        ("-", None, "must be in a file"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_one_line(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        list(read_prompts(Path(name) if name == "-" else tmp_path / name))


def test_reading_prompts_holds_no_list_of_them(tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "a.txt").write_text("a red cat on a blue mat\n" * 100_000)
    tracemalloc.start()
    assert sum(1 for _ in read_prompts(tmp_path / "a.txt")) == 100_000
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
