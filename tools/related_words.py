"""Writes export/small_model/dataset/related.txt: common words that the embedded model does not know, by the things that mean most nearly
the same, as sentence embeddings of all-MiniLM-L6-v2 tell. To be run again when vocabulary.txt changes: two minutes on two cores."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from snoopi_rt.export.small_model.bundle_vocabulary import vocabulary
from snoopi_rt.export.text import minilm
from snoopi_rt.runtime.vocabulary import Matcher

ALIKE = 0.5
"""The least cosine of two words that are related. Below it are more accidents than relations."""
NEAREST = 2
"""Things of one word."""
BATCH = 256
LEFT_OUT = frozenset(["bitch", "cock", "dick", "porn", "pornography", "pussy", "sex", "sexually", "tits", "whore"])
OUT = Path(__file__).parent.parent / "export" / "small_model" / "dataset" / "related.txt"


@torch.no_grad()
def embed(tokenizer: Tokenizer, encoder: torch.nn.Module, words: list[str]) -> Tensor:
    """(N, 384), of length 1: the mean of a word's token states."""
    rows = torch.zeros(len(words), encoder.config.hidden_size)
    ids = [tokenizer.encode(word).ids for word in words]
    for length in {len(row) for row in ids}:
        places = [i for i, row in enumerate(ids) if len(row) == length]
        for start in range(0, len(places), BATCH):
            part = places[start : start + BATCH]
            rows[part] = encoder(torch.tensor([ids[i] for i in part])).last_hidden_state.mean(1)
    return torch.nn.functional.normalize(rows, dim=-1)


def main() -> None:
    tokenizer = Tokenizer.from_file(str(minilm.folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    matcher, things = Matcher(vocabulary()), list(vocabulary().objects)
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    words = [word for word in words if word not in LEFT_OUT and (unknown := matcher.unknown(word)) and unknown.object]
    encoder = minilm.load_text_encoder()
    alike = embed(tokenizer, encoder, words) @ embed(tokenizer, encoder, things).T
    related: dict[str, list[str]] = {thing: [] for thing in things}
    for word, row in zip(words, alike, strict=True):
        values, places = row.topk(NEAREST)
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            if value >= ALIKE:
                related[things[place]].append(word)
    OUT.write_text("".join(f"{thing}: {' '.join(found)}\n" for thing, found in related.items() if found), encoding="utf-8")
    print(f"{len({word for found in related.values() for word in found})} words in {OUT}")


if __name__ == "__main__":
    main()
