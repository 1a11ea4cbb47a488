"""The kinds of negative guidance that a graph can be built with. Each is one attention function and its range of scales."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from snoopi_rt.engines.base import InputError
from snoopi_rt.kernels import nasa_attention, projected_attention


@dataclass(frozen=True)
class Guidance:
    """How a negative prompt acts in a cross-attention.

    `attend(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, scale)` gives the attention output before the output projection
    (kernels/ops/reference.py has the shapes); it equals the positive attention where scale is 0. None: the graph takes no negative.
    `measures_from_empty`: `attend` also takes the keys and values of the empty prompt, which are constants of the graph.
    """

    kind: Literal["nasa", "projected", "none"]
    attend: Callable[..., Tensor] | None
    max_scale: float = 1.0
    measures_from_empty: bool = False


GUIDANCE: dict[str, Guidance] = {
    kind.kind: kind
    for kind in (
        Guidance("nasa", nasa_attention, max_scale=1.5),
        Guidance("projected", projected_attention, max_scale=2.0, measures_from_empty=True),
        Guidance("none", None),
    )
}


def find_guidance(kind: str) -> Guidance:
    """The guidance of that name. Raises InputError, naming the known ones."""
    if kind not in GUIDANCE:
        raise InputError(f"unknown guidance {kind!r}, choose from {', '.join(GUIDANCE)}")
    return GUIDANCE[kind]
