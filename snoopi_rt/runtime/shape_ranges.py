"""The ranges of the dynamic axes of a bundle's graphs, for engines that compile for them."""

from snoopi_rt.bundle.bundle import Bundle, Variant
from snoopi_rt.engines.base import Axis

TOKENS = 16
"""Engines that prefer fixed shapes get prompts padded to a multiple of this many tokens, if the graph has masks."""


def shape_ranges(bundle: Bundle, graph: str, variant: Variant) -> dict[str, Axis]:
    """The range of each dynamic axis, by name. A text encoder gets one prompt at a time; a variant may limit the batch further."""
    longest = bundle.text.max_tokens
    tokens = Axis(1, min(TOKENS, longest), longest) if bundle.text.pad is None else Axis(longest, longest, longest)
    batch = 1 if graph == "text_encoder" else min(bundle.max_batch, variant.max_batch or bundle.max_batch)
    heights, widths = ([size[side] // bundle.latent.factor for size in bundle.sizes] for side in (0, 1))
    if graph == "decoder" and bundle.tile is not None:
        heights, widths = ([min(side, bundle.tile.size) for side in sides] for sides in (heights, widths))
    return {
        "batch": Axis(1, 1, batch),
        "tokens": tokens,
        # No negative prompt is one token.
        "negative_tokens": Axis(1, tokens.opt, longest),
        "height": Axis(min(heights), heights[0], max(heights)),
        "width": Axis(min(widths), widths[0], max(widths)),
    }
