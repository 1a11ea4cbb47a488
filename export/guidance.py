"""The kinds of negative guidance that a graph can be built with: one attention function each, its constants and its range of scales.

Data only: the functions, and torch with them, are imported on first use.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from snoopi_rt.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How a negative prompt acts in a cross-attention. The scale is an input at run time."""

    kind: str
    formula: str | None
    """The function's name in snoopi_rt.kernels; None: takes no negative."""
    default_scale: float = 0.0
    """For a student whose preset has none."""
    max_scale: float = 0.0
    fixed: Mapping[str, float] = field(default_factory=dict)
    """The formula's constants in the graph."""
    measures_from_empty: bool = False
    """Whether `attend` also takes the keys and values of the empty prompt, which are constants of the graph."""

    @property
    def attend(self) -> "Callable[..., Tensor] | None":
        """`attend(q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, scale, [k_null, v_null,] [attention=])`, or None: takes no negative.

        Gives the attention output before the output projection (kernels/ops/reference.py has the shapes), the positive attention's at
        scale 0.
        """
        if self.formula is None:
            return None
        from snoopi_rt import kernels

        return partial(getattr(kernels, self.formula), **self.fixed)


GUIDANCE: dict[str, Guidance] = {
    guidance.kind: guidance
    for guidance in (
        Guidance("nasa", "nasa_attention", default_scale=0.2, max_scale=1.5),
        # tau, and phi and alpha of SDXL (NAG, table 5); presets have their own.
        Guidance("nag", "nag_attention", default_scale=2.0, max_scale=10.0, fixed={"tau": 2.5, "alpha": 0.5}),
        Guidance("vsf", "vsf_attention", default_scale=1.0, max_scale=4.0),
        Guidance("projected", "projected_attention", default_scale=1.0, max_scale=2.0, measures_from_empty=True),
        Guidance("none", None),
    )
}


def find_guidance(kind: str, negative: bool = False) -> Guidance:
    """The guidance of that name, with `negative` one that takes a negative prompt. Raises InputError, naming the known ones."""
    known = {name: guidance for name, guidance in GUIDANCE.items() if guidance.formula is not None or not negative}
    if kind not in known:
        raise InputError(f"unknown guidance {kind!r}, choose from {', '.join(known)}")
    return known[kind]
