"""How far a variant is from PyTorch: in its outputs, in the image, and in the clean latent."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from snoopi_rt.bundle.bundle import Parity
from snoopi_rt.engines import load_engine
from snoopi_rt.engines.base import TensorSpec
from snoopi_rt.errors import OutputError

NamedArrays = Mapping[str, np.ndarray]
"""The inputs or outputs of a graph by name."""

FP32_TOLERANCE = {"text_encoder": 1e-4, "generator": 1e-4, "decoder": 1e-3}
"""The largest relative L2 distance of each graph in fp32 with fp32 weights, on any engine. Measured on networks of full size with random
weights: text_encoder 3e-6, generator 1e-5. The decoder's output is in whole levels of 255, some of which round the other way: 2e-5."""
LATENT_TOLERANCE = 0.05
"""How much any other variant may change the clean latent, whose standard deviation is about 1. Epsilon students multiply their error by
sigma / alpha into it: 14.6 for SD at t = 999."""
INT8_TOLERANCE = 0.25
"""How much a generator in int8 may change it that was asked for by name: SD 2.1 with random weights has 0.18, at two thirds of the time."""
IMAGE_TOLERANCE = 0.01
"""How much a decoder may change its image, in units of full white: a PSNR of 40 dB."""
FLAT = 2.0
"""Levels of 255: an image with a lower standard deviation shows nothing."""
MAX_PSNR = 99.0
"""dB; what is reported of equal images, whose PSNR is infinite."""


@dataclass(frozen=True)
class LatentComparison:
    """How the outputs of a text encoder or generator are judged: by the clean latent, and the image, that they lead to."""

    to_latent: Callable[[int, NamedArrays], np.ndarray]
    """The clean latent (1, C, h, w) for the outputs of sample i."""
    reference: Sequence[np.ndarray]
    """PyTorch's clean latents, by sample."""
    decode: Callable[[np.ndarray], np.ndarray]
    """The image (1, H, W, 3) uint8 of a latent."""

    def error(self, i: int, outputs: NamedArrays) -> float:
        """How much the outputs of sample i change the clean latent (rms), whose standard deviation is about 1."""
        return rms(self.to_latent(i, outputs) - self.reference[i])


@dataclass(frozen=True)
class Measurement:
    """The parity of one model file, and what its engines report of it."""

    parity: Parity
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    providers: tuple[str, ...]


def measure(
    graph: str,
    path: Path,
    precision: str,
    engines: Sequence[str],
    samples: Sequence[NamedArrays],
    reference: Sequence[NamedArrays],
    comparison: LatentComparison | None = None,
) -> Measurement:
    """The largest distance over samples and engines of the outputs of the model in `path` from PyTorch's, the `reference`.

    Raises OutputError for NaN or infinity in an output or in what is compared, and for a flat image if PyTorch's is not.
    """
    worst, providers = Parity(0.0, 0.0), []
    for name in engines:
        engine = load_engine(name, path, precision)
        try:
            providers.append(engine.provider)
            progress = tqdm(samples, desc=f"{name} {precision}", unit="sample", leave=False)
            for i, (sample, expected) in enumerate(zip(progress, reference, strict=True)):
                outputs = engine(**{spec.name: sample[spec.name] for spec in engine.inputs})
                distance = _distance(graph, name, outputs, expected)
                if comparison is not None:
                    latent = comparison.to_latent(i, outputs)
                    distance = replace(distance, latent_error=rms(latent - comparison.reference[i]))
                    if i == 0:
                        distance = replace(distance, psnr=psnr(comparison.decode(latent), comparison.decode(comparison.reference[i])))
                worst = _worse(worst, distance)
                if not all(math.isfinite(value) for value in astuple(worst) if value is not None):
                    raise OutputError(f"graph {graph} on engine {name!r} leads to NaN or infinity in the comparison with PyTorch")
            specs = engine.inputs, engine.outputs
        finally:
            engine.close()
    return Measurement(worst, *specs, tuple(providers))


def rms(difference: np.ndarray) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


def relative_l2(output: np.ndarray, expected: np.ndarray) -> float:
    """The L2 norm of the difference over that of the expected array: 0 for equal arrays, 1 for zeros."""
    output, expected = output.astype(np.float64), expected.astype(np.float64)
    difference, size = float(np.linalg.norm(output - expected)), float(np.linalg.norm(expected))
    return difference / size if size else (math.inf if difference else 0.0)


def psnr(image: np.ndarray, expected: np.ndarray) -> float:
    """The peak signal-to-noise ratio of a uint8 image in dB, at most MAX_PSNR."""
    error = rms(image.astype(np.float64) - expected.astype(np.float64))
    return MAX_PSNR if error == 0 else min(MAX_PSNR, float(20 * np.log10(255 / error)))


def _distance(graph: str, engine: str, outputs: NamedArrays, expected: NamedArrays) -> Parity:
    distance = Parity(0.0, 0.0)
    for name in expected:
        output, reference = outputs[name].astype(np.float64), expected[name].astype(np.float64)
        if not np.isfinite(output).all():
            raise OutputError(f"graph {graph} gives NaN or infinity on engine {engine!r}")
        if graph == "decoder" and (output.std((1, 2, 3)) < FLAT).any() and (reference.std((1, 2, 3)) >= FLAT).all():
            raise OutputError(f"graph decoder gives a flat image on engine {engine!r}")
        image_psnr = psnr(outputs[name], expected[name]) if graph == "decoder" else None
        distance = _worse(distance, Parity(relative_l2(output, reference), float(np.abs(output - reference).max()), psnr=image_psnr))
    return distance


def _worse(one: Parity, other: Parity) -> Parity:
    """The larger error of both in each respect; NaN if one is NaN, as np.max has it and max has not."""
    errors = [error for error in (one.latent_error, other.latent_error) if error is not None]
    ratios = [ratio for ratio in (one.psnr, other.psnr) if ratio is not None]
    return Parity(
        float(np.max([one.relative_l2, other.relative_l2])),
        float(np.max([one.max_abs, other.max_abs])),
        float(np.max(errors)) if errors else None,
        min(ratios) if ratios else None,
    )
