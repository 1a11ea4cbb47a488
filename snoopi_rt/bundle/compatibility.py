"""Whether the parts of a bundle fit together: the tokenizer and the text encoder, and the shapes of its graphs."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from snoopi_rt.bundle.manifest import File, Latent, Text, Tile, require
from snoopi_rt.bundle.onnx_file import embedded_tokens
from snoopi_rt.bundle.tokenizer import highest_id
from snoopi_rt.bundle.variant import Variant
from snoopi_rt.cache import Cache
from snoopi_rt.errors import BundleError
from snoopi_rt.json_reader import parse_json

Graphs = Mapping[str, Sequence[Variant]]
Shape = tuple[int | Collection[int] | None, ...]
"""The allowed sizes of each axis: one, several, or with None any."""


_TEXT = {
    "states": ("states", 2),
    "prompt_states": ("states", 2),
    "negative_states": ("states", 2),
    "pooled": ("pooled", 1),
    "prompt_pooled": ("pooled", 1),
}


def check_shapes(graphs: Graphs, text: Text, latent: Latent, sizes: Sequence[tuple[int, int]], tile: Tile | None) -> None:
    """Raises BundleError unless all shapes that bundle.json lists fit its latent, its sizes and each other."""
    sides = [{size[axis] // latent.factor for size in sizes} for axis in (0, 1)]
    decoded = sides if tile is None else [{min(side, tile.size) for side in axis} for axis in sides]
    pixels = [{side * latent.factor for side in axis} for axis in decoded]
    widths: dict[str, int | None] = {}
    for graph, variants in graphs.items():
        for variant in variants:
            shapes = {spec.name: spec.shape for spec in (*variant.inputs, *variant.outputs)}
            expected: dict[str, Shape] = {
                "ids": (None, None if text.pad is None else text.max_tokens),
                "noise": (None, latent.channels, *sides),
                "renoise": (None, None, latent.channels, *sides),
                "latent": (None, latent.channels, *(decoded if graph == "decoder" else sides)),
                "image": (None, *pixels, 3),
            }
            for name in shapes.keys() & expected.keys():
                _require_fit(variant, name, shapes[name], expected[name])
            for name in shapes.keys() & _TEXT.keys():  # the text encoder's outputs are the generator's inputs
                kind, axes = _TEXT[name]
                width = shapes[name][-1] if shapes[name] else None
                _require_fit(variant, name, shapes[name], (*[None] * axes, widths.setdefault(kind, width)))


def check_tokens(folder: Path, graphs: Graphs, text: Text, cache: Cache | None) -> None:
    """Raises BundleError unless the text encoder has an embedding for every token of the tokenizer.

    Otherwise one engine would fail at a prompt with such a token, and another would silently draw something. Cached counts are trusted.
    """
    tokenizer = text.tokenizer
    if tokenizer is None:
        return
    for model in (variant.files[0] for variant in graphs.get("text_encoder", ()) if variant.format == "onnx"):
        highest, embedded = _token_counts(folder, tokenizer, model, cache)
        if embedded is None:
            continue
        require(
            highest < embedded,
            f"{folder / tokenizer.path} has token ids up to {highest}, {model.path} has embeddings for {embedded}: "
            "they do not belong to the same model",
        )
        pad = text.pad or 0
        require(pad < embedded, f"prompts are padded with token id {pad}, {model.path} has embeddings for {embedded}")


def _token_counts(folder: Path, tokenizer: File, model: File, cache: Cache | None) -> tuple[int, int | None]:
    """The highest token id of the tokenizer, and the number of the model's embeddings."""
    key = f"tokens-{tokenizer.sha256}-{model.sha256}.json"
    try:
        highest, embedded = parse_json((cache.read("hashes", key) if cache is not None else None) or b"null")
        if type(highest) is int and type(embedded) in (int, type(None)):
            return highest, embedded
    except (TypeError, ValueError):  # not in the cache, or damaged
        pass
    highest, embedded = highest_id(folder / tokenizer.path), embedded_tokens(folder / model.path)
    if cache is not None:
        cache.write("hashes", key, json.dumps([highest, embedded]).encode())
    return highest, embedded


def _require_fit(variant: Variant, name: str, shape: tuple[int | None, ...], expected: Shape) -> None:
    fits = len(shape) == len(expected) and all(
        size is None or allowed is None or size == allowed or (isinstance(allowed, Collection) and size in allowed)
        for size, allowed in zip(shape, expected, strict=True)
    )
    if not fits:
        shapes = ("any" if allowed is None else str(allowed if isinstance(allowed, int) else sorted(allowed)) for allowed in expected)
        raise BundleError(f"{variant.files[0].path} has {name} of shape {list(shape)}, the other parts need ({', '.join(shapes)})")
