"""Whether the parts of a bundle fit each other: tokenizer and text encoder, and the shapes from graph to graph and in the manifest."""

import json
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from snoopi_rt.bundle.manifest import File, Variant, require
from snoopi_rt.bundle.onnx_file import embedded_tokens
from snoopi_rt.cache import Cache
from snoopi_rt.errors import BundleError
from snoopi_rt.json_reader import parse_json
from snoopi_rt.tokenizer import highest_id

if TYPE_CHECKING:
    from snoopi_rt.bundle.bundle import Bundle

Shape = tuple[int | Collection[int] | None, ...]
"""What each axis may be: a number, one of several, or, with None, anything."""


_TEXT = {
    "states": ("states", 2),
    "prompt_states": ("states", 2),
    "negative_states": ("states", 2),
    "pooled": ("pooled", 1),
    "prompt_pooled": ("pooled", 1),
}


def check_shapes(bundle: "Bundle") -> None:
    """Returns where all shapes that the manifest lists fit its latent, its sizes and each other; raises BundleError."""
    latent, tile = bundle.latent, bundle.tile
    sides = [{size[axis] // latent.factor for size in bundle.sizes} for axis in (0, 1)]
    decoded = sides if tile is None else [{min(side, tile.size) for side in axis} for axis in sides]
    pixels = [{side * latent.factor for side in axis} for axis in decoded]
    widths: dict[str, int | None] = {}
    for graph, variants in bundle.graphs.items():
        for variant in variants:
            shapes = {spec.name: spec.shape for spec in (*variant.inputs, *variant.outputs)}
            expected: dict[str, Shape] = {
                "ids": (None, None if bundle.text.pad is None else bundle.text.max_tokens),
                "noise": (None, latent.channels, *sides),
                "renoise": (None, None, latent.channels, *sides),
                "latent": (None, latent.channels, *(decoded if graph == "decoder" else sides)),
                "image": (None, *pixels, 3),
            }
            for name in shapes.keys() & expected.keys():
                _require_fit(variant, name, shapes[name], expected[name])
            for name in shapes.keys() & _TEXT.keys():  # what a text encoder gives, generators take
                kind, axes = _TEXT[name]
                width = shapes[name][-1] if shapes[name] else None
                _require_fit(variant, name, shapes[name], (*[None] * axes, widths.setdefault(kind, width)))


def check_tokens(bundle: "Bundle", cache: Cache | None) -> None:
    """Returns where the text encoder has an embedding for every token of the tokenizer; raises BundleError.

    Else one engine fails at the prompt that has such a token, and another draws something in silence. What the cache knows is trusted.
    """
    tokenizer = bundle.text.tokenizer
    if tokenizer is None:
        return
    for model in _encoders(bundle):
        highest, embedded = _counted(bundle, tokenizer, model, cache)
        if embedded is None:
            continue
        require(
            highest < embedded,
            f"{bundle.folder / tokenizer.path} has token ids up to {highest}, {model.path} has embeddings for {embedded}: "
            "they are not of one model",
        )
        pad = bundle.text.pad or 0
        require(pad < embedded, f"prompts are filled with token id {pad}, {model.path} has embeddings for {embedded}")


def _encoders(bundle: "Bundle") -> Iterator[File]:
    return (variant.files[0] for variant in bundle.graphs.get("text_encoder", ()) if variant.format == "onnx")


def _counted(bundle: "Bundle", tokenizer: File, model: File, cache: Cache | None) -> tuple[int, int | None]:
    """The highest id of the tokenizer, and how many the model has embeddings for."""
    key = f"tokens-{tokenizer.sha256}-{model.sha256}.json"
    try:
        highest, embedded = parse_json((cache.read("hashes", key) if cache is not None else None) or b"null")
        if type(highest) is int and type(embedded) in (int, type(None)):
            return highest, embedded
    except (TypeError, ValueError):  # nothing is noted, or it is damaged
        pass
    highest, embedded = highest_id(bundle.folder / tokenizer.path), embedded_tokens(bundle.folder / model.path)
    if cache is not None:
        cache.write("hashes", key, json.dumps([highest, embedded]).encode())
    return highest, embedded


def _require_fit(variant: Variant, name: str, shape: tuple[int | None, ...], expected: Shape) -> None:
    fits = len(shape) == len(expected) and all(
        have is None or want is None or have == want or (isinstance(want, Collection) and have in want)
        for have, want in zip(shape, expected, strict=True)
    )
    if not fits:
        written = ", ".join("any" if want is None else str(want if isinstance(want, int) else sorted(want)) for want in expected)
        raise BundleError(f"{variant.files[0].path} has {name} of shape {list(shape)}, which does not fit the other parts: ({written})")
