"""The variants of a graph in bundle.json: engines, precision, files, inputs and outputs, and the measured error against PyTorch."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from snoopi_rt.bundle.manifest import INT32, MANIFEST, MAX_BATCH, File, require, require_range
from snoopi_rt.engines.base import TensorSpec


@dataclass(frozen=True)
class Parity:
    """The measured error of a graph against PyTorch.

    `latent_error` is the RMS error of the clean latent, whose standard deviation is about 1; `psnr` is that of the image in dB, a finite
    number. None if not measured.
    """

    relative_l2: float
    max_abs: float
    latent_error: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        require(abs(self.psnr or 0) <= 1000, f"psnr {self.psnr} is not a plausible number of dB")

    @property
    def error(self) -> float:
        """The error that counts: of the latent, or else of the image, RMS relative to full white, or else the relative L2."""
        if self.latent_error is not None:
            return self.latent_error
        return self.relative_l2 if self.psnr is None else 10 ** (-self.psnr / 20)

    @property
    def kind(self) -> str:
        """What that error is called."""
        if self.latent_error is not None:
            return "latent error"
        return "relative L2" if self.psnr is None else "RMS of full white"

    def judged(self, digits: int) -> str:
        """That error and its kind."""
        return f"{self.error:.{digits}g} ({self.kind})"


@dataclass(frozen=True)
class Variant:
    """One variant of a graph: the engines that it is for, and its files, the first of which is opened.

    `tolerance` is the largest error that it was allowed; `max_batch` limits the batch of this variant if it needs that.
    """

    engines: tuple[str, ...]
    precision: str
    format: Literal["onnx", "openvino-ir"]
    files: tuple[File, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Parity
    tolerance: float
    max_batch: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.engines and self.files and self.inputs and self.outputs), "a variant needs engines, files, inputs and outputs")
        names = [file.path for file in self.files]
        for kind, listed in ("file", names), ("input", [s.name for s in self.inputs]), ("output", [s.name for s in self.outputs]):
            require(len(set(listed)) == len(listed), f"a variant lists the same {kind} twice: {', '.join(listed)}")
        main = Path(names[0])
        if self.format == "onnx":
            require(main.suffix == ".onnx", f"the first file of an onnx variant must be an .onnx file, not {main}")
        else:
            complete = main.suffix == ".xml" and str(main.with_suffix(".bin")) in names
            require(complete, f"an openvino-ir variant must list an .xml file and its .bin, not {', '.join(names)}")
        require_range(f"{main}: max_batch", 1 if self.max_batch is None else self.max_batch, 1, MAX_BATCH)
        for spec in (*self.inputs, *self.outputs):
            require(
                all(size is None or 0 < size <= INT32 for size in spec.shape), f"{main}: {spec.name} has an impossible shape {spec.shape}"
            )
        within, digits = self.parity.error <= self.tolerance, digits_apart(self.parity.error, self.tolerance)
        require(within, f"{main} is {self.parity.judged(digits)} off PyTorch, beyond its tolerance {self.tolerance:.{digits}g}")

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of this variant's entry in bundle.json, including the hashes of its files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def check_graph(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Raises BundleError unless an opened graph has the inputs and outputs that bundle.json promises, as far as its engine tells."""
        name = self.files[0].path
        for kind, promised, opened in ("input", self.inputs, inputs), ("output", self.outputs, outputs):
            specs = {spec.name: spec for spec in opened}
            known = ", ".join(sorted(spec.name for spec in promised))
            require(
                ", ".join(sorted(specs)) == known, f"{name} has the {kind}s {', '.join(sorted(specs))}, but {MANIFEST} promises {known}"
            )
            for spec in promised:
                other = specs[spec.name]
                fits = len(other.shape) == len(spec.shape) and all(
                    None in sizes or len(set(sizes)) == 1 for sizes in zip(spec.shape, other.shape, strict=True)
                )
                require(
                    fits and other.dtype == spec.dtype,
                    f"{name}: {kind} {spec.name!r} is {other.dtype} {other.shape}, but {MANIFEST} promises {spec.dtype} {spec.shape}",
                )

    def described(self) -> str:
        """A description for people, with its error against PyTorch: first the one that counts, and how large it may be."""
        size, parity = sum(file.size for file in self.files) / 1e6, self.parity
        batch = "" if self.max_batch is None else f", up to {self.max_batch} at once"
        figures = [f"{parity.kind} {parity.error:.2g} of {self.tolerance:.2g} allowed"]
        if parity.kind != "relative L2":
            figures.append(f"relative L2 {parity.relative_l2:.2g}")
        if parity.psnr is not None:
            figures.append(f"PSNR {parity.psnr:.1f} dB")
        return f"{self.precision} for {', '.join(self.engines)} ({self.format}, {size:.1f} MB{batch}), {', '.join(figures)}"


def digits_apart(one: float, other: float) -> int:
    """How many digits, at least two, two numbers need to look different: 0.0501 is beyond 0.05."""
    return next((digits for digits in range(2, 9) if f"{one:.{digits}g}" != f"{other:.{digits}g}"), 2)


def legend(names: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each (precision, engine) whose precision needs an explanation."""
    engines: dict[tuple[str, str], list[str]] = {}
    for precision, engine in sorted(set(names)):
        engines.setdefault((precision, meaning(precision, engine)), []).append(engine)
    return [f"{precision} on {', '.join(names)}: {means}" for (precision, means), names in engines.items() if means != precision]


def meaning(precision: str, engine: str) -> str:
    """What a precision means on an engine."""
    if engine in ("cuda", "tensorrt"):
        return f"{precision} arithmetic"
    activations = "bf16" if engine == "openvino" else "fp32"
    return {
        "bf16": "fp16 weights, bf16 arithmetic",
        "fp16": "fp16 weights, fp32 arithmetic",
        "int8": f"int8 matrix products, otherwise {activations}",
        "int8-weights": "int8 weights, fp32 arithmetic",
        "int4-weights": "int4 weights, fp32 arithmetic",
    }.get(precision, precision)
