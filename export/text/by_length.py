"""Prompts through a text encoder in batches of one length, so that no token sees padding."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def encode_by_length(encode: Callable[[list[Tensor]], Iterable[Tensor]], ids: Sequence[Tensor], batch: int) -> list[Tensor]:
    """The states (T, D) of each prompt's ids (1, T), in their order.

    encode: batches of ids (B, T) to their states (B, T, D). It gets all batches in one call, since T5 is read from disk once for each.
    """
    order = sorted(range(len(ids)), key=lambda i: ids[i].shape[1])
    groups = []
    for _, same in itertools.groupby(order, key=lambda i: ids[i].shape[1]):
        members = list(same)
        groups += [members[start : start + batch] for start in range(0, len(members), batch)]
    states: list[Tensor] = [torch.empty(0)] * len(ids)
    for group, encoded in zip(groups, encode([torch.cat([ids[i] for i in group]) for group in groups]), strict=True):
        for i, row in zip(group, encoded, strict=True):
            states[i] = row
    return states
