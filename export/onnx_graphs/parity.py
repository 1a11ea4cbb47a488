"""How far a variant is from PyTorch: by its numbers, by the picture, and by what it does to the clean latent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from snoopi_rt.bundle.bundle import Parity
from snoopi_rt.engines import load_engine
from snoopi_rt.engines.base import TensorSpec
from snoopi_rt.errors import OutputError

Arrays = Mapping[str, np.ndarray]

# graph -> largest relative L2 distance of a build in fp32 with fp32 weights, on any engine. Measured on networks of full size with random
# weights: text_encoder 3e-6, generator 1e-5. The decoder's answer is in whole levels of 255, some of which round the other way: 2e-5.
FP32_TOLERANCE = {"text_encoder": 1e-4, "generator": 1e-4, "decoder": 1e-3}
# What any other build may change in the clean latent, whose deviation is about 1 (epsilon students multiply their error by sigma / alpha
# into it, 14.6 for SD at t = 999), and the decoder in its picture, in units of full white: 0.01 is a PSNR of 40 dB.
LATENT_TOLERANCE = 0.05
PICTURE_TOLERANCE = 0.01
FLAT = 2.0  # levels of 255: an image whose deviation is below this shows nothing
LOSSLESS = 99.0  # dB, said of pictures that are equal


@dataclass(frozen=True)
class View:
    """How the outputs of a text encoder or generator are judged by the picture that they make.

    latent(i, outputs): the clean latent that case i's outputs give. wanted: PyTorch's, by case. picture: the image of a latent.
    """

    latent: Callable[[int, Arrays], np.ndarray]
    wanted: Sequence[np.ndarray]
    picture: Callable[[np.ndarray], np.ndarray]

    def error(self, i: int, outputs: Arrays) -> float:
        """What case i's outputs change in the clean latent, rms: such a latent has a deviation of about 1."""
        return rms(self.latent(i, outputs) - self.wanted[i])


@dataclass(frozen=True)
class Measured:
    """What was found of one variant, and what the engines said of it."""

    parity: Parity
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    providers: tuple[str, ...]


def measure(
    graph: str,
    path: Path,
    precision: str,
    engines: Sequence[str],
    cases: Sequence[Arrays],
    wanted: Sequence[Arrays],
    view: View | None = None,
) -> Measured:
    """The worst distance over cases and engines of the graph in `path` from the outputs `wanted`.

    Raises OutputError for NaN or infinity, and for a flat image where PyTorch's is not.
    """
    worst, providers = Parity(0.0, 0.0), []
    for name in engines:
        engine = load_engine(name, path, precision)
        try:
            providers.append(engine.provider)
            for i, (case, want) in enumerate(zip(tqdm(cases, desc=f"{name} {precision}", unit="case", leave=False), wanted, strict=True)):
                found = engine(**{spec.name: case[spec.name] for spec in engine.inputs})
                worst = _worse(worst, _distance(graph, name, found, want))
                if view is not None:
                    latent = view.latent(i, found)
                    worst = _worse(worst, Parity(0.0, 0.0, latent_error=rms(latent - view.wanted[i])))
                    if i == 0:
                        worst = _worse(worst, Parity(0.0, 0.0, psnr=psnr(view.picture(latent), view.picture(view.wanted[i]))))
            specs = engine.inputs, engine.outputs
        finally:
            engine.close()
    return Measured(worst, *specs, tuple(providers))


def rms(change: np.ndarray) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(change, dtype=np.float64))))


def relative_l2(found: np.ndarray, wanted: np.ndarray) -> float:
    """The distance in units of the wanted array's length."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 images in dB, at most LOSSLESS."""
    error = rms(found.astype(np.float64) - wanted.astype(np.float64))
    return LOSSLESS if error == 0 else min(LOSSLESS, float(20 * np.log10(255 / error)))


def _distance(graph: str, engine: str, found: Arrays, wanted: Arrays) -> Parity:
    distance = Parity(0.0, 0.0)
    for name, want in wanted.items():
        have, want = found[name].astype(np.float64), want.astype(np.float64)
        if not np.isfinite(have).all():
            raise OutputError(f"graph {graph} gives NaN or infinity on engine {engine!r}")
        if graph == "decoder" and (have.std((1, 2, 3)) < FLAT).any() and (want.std((1, 2, 3)) >= FLAT).all():
            raise OutputError(f"graph decoder gives a flat image on engine {engine!r}")
        image = psnr(found[name], wanted[name]) if graph == "decoder" else None
        distance = _worse(distance, Parity(relative_l2(have, want), float(np.abs(have - want).max()), psnr=image))
    return distance


def _worse(one: Parity, other: Parity) -> Parity:
    errors = [error for error in (one.latent_error, other.latent_error) if error is not None]
    ratios = [ratio for ratio in (one.psnr, other.psnr) if ratio is not None]
    return Parity(
        max(one.relative_l2, other.relative_l2),
        max(one.max_abs, other.max_abs),
        max(errors) if errors else None,
        min(ratios) if ratios else None,
    )
