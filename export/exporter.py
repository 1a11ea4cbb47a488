"""A student's weights to a bundle: load, write the graphs, measure them, write the manifest; in that order."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt import __version__
from snoopi_rt.bundle.bundle import GRAPHS, MANIFEST, Bundle, Scale, Tile, Vocabulary
from snoopi_rt.bundle.bundle import Guidance as GuidancePromise
from snoopi_rt.bundle.manifest import text_rule
from snoopi_rt.bundle.tokenizer import Tokenizer, highest_id
from snoopi_rt.engines import installed
from snoopi_rt.errors import EngineMissing, InputError, OutputError, how_to_install
from snoopi_rt.export.backbones import Backbone, Student, find_backbone
from snoopi_rt.export.final_check import Extreme, draw_whole, extreme_ids
from snoopi_rt.export.guidance import Guidance, find_guidance
from snoopi_rt.export.onnx_graphs import calibration
from snoopi_rt.export.onnx_graphs.parity import (
    FP32_TOLERANCE,
    IMAGE_TOLERANCE,
    INT8_TOLERANCE,
    LATENT_TOLERANCE,
    LatentComparison,
    NamedArrays,
    rms,
)
from snoopi_rt.export.onnx_graphs.variants import Graph, check_precision, write_variants
from snoopi_rt.export.source import Source
from snoopi_rt.files import check_place, hidden, reason
from snoopi_rt.prompt_encoder import write_prompts
from snoopi_rt.shell import quote

MEASURED_ON = ("cpu", "openvino")
MAX_PIXELS = 64 * 128**2
"""Of all images of a batch, which bounds its memory: 4 images of 512 x 512."""
TEXT_SAMPLES = 2
"""How many evaluation prompts a text encoder is judged by: each takes a whole forward pass of the generator."""
DECODER_SAMPLES = 4
LARGE_DECODER = 10_000_000
"""Parameters; TAESD has 1.2 million in its decoder, AutoencoderKL 49."""
TILE = 512
"""Pixels a side of a tile: AutoencoderKL needs 2.6 GB of activations for 512 x 512, and four times that for twice the sides."""
LATENT_TILE = 32
"""Latent pixels that it has at least: AutoencoderDC, of factor 32, draws 1024 x 1024 at once as diffusers does, its attention sees all."""
OVERLAP = 16
"""Latent pixels that two tiles share: a decoder's receptive field is counted in those."""


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose of a bundle. Raises InputError for unknown names and values that cannot be."""

    guidance: str = "nasa"
    """The kind of negative guidance."""
    precision: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of precisions by graph, in the order of preference; a graph without any gets the backbone's."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels, the default first; none: the preset's."""
    tolerance: float | None = None
    """How much a variant may change the clean latent (rms); None: LATENT_TOLERANCE, and INT8_TOLERANCE for a generator in int8 by name."""
    prompts: tuple[str, ...] = ()
    """The prompts whose states the bundle carries."""
    prompts_only: bool = False
    """Whether to leave the text encoder out: the bundle knows `prompts` and no others."""
    force: bool = False
    """Whether to replace a bundle that is there."""
    vocabulary: Vocabulary | None = None
    """As in Bundle; None: the student's."""
    examples: tuple[str, ...] = ()
    """As in Bundle; none: the student's."""
    or_nearest: frozenset[str] = frozenset()
    """The precisions that were asked for without naming a graph: a graph that cannot have one gets the nearest that it can."""

    def __post_init__(self) -> None:
        find_guidance(self.guidance)
        for name in (name for names in self.precision.values() for name in names):
            check_precision(name)
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise InputError(f"tolerance {self.tolerance:g} is not a positive number")
        if self.prompts_only and not self.prompts:
            raise InputError("a bundle without text encoder needs the prompts that it is to know: --prompts FILE")


@dataclass(frozen=True)
class ExportPlan:
    """What is exported, checked before any weights are loaded."""

    source: Source
    options: ExportOptions
    backbone: Backbone
    guidance: Guidance
    sizes: tuple[tuple[int, int], ...]
    precision: Mapping[str, Sequence[str]]
    engines: tuple[str, ...]

    @classmethod
    def of(cls, source: Source, options: ExportOptions) -> "ExportPlan":
        """The plan. Raises InputError for unknown names and impossible sizes, EngineMissing where no engine can measure parity."""
        backbone, preset = find_backbone(source.preset.backbone), source.preset
        sizes, multiple = options.sizes or ((preset.size, preset.size),), backbone.multiple * source.latent.factor
        for height, width in sizes:
            if height % multiple or width % multiple or min(height, width) <= 0:
                raise InputError(f"size {width}x{height}: the sides of {backbone.name} are multiples of {multiple} pixels")
        precision = {graph: options.precision.get(graph, [backbone.precision[graph]]) for graph in GRAPHS}
        engines = tuple(name for name in installed() if name in MEASURED_ON)
        if not engines:
            raise EngineMissing(f"export measures parity on an engine, and none is installed: {how_to_install('export')}")
        return cls(source, options, backbone, preset.guidance(options.guidance), sizes, precision, engines)


def export(source: Source, out: Path, options: ExportOptions | None = None, say: Callable[[str], None] = lambda line: None) -> Bundle:
    """Writes a student to the bundle `out` and returns it; `say` gets a line for everything that is measured.

    Raises InputError (unknown names, weights that do not fit, `out` in use), OutputError where a graph is too far from PyTorch or the
    finished bundle does not draw what it promises. The bundle appears under the name `out` when it is complete; with `force` it then
    replaces the one that is there.
    """
    plan = ExportPlan.of(source, options or ExportOptions())
    old = hidden(out, ".old")
    if old.exists() and not out.exists():  # killed between two renames
        old.replace(out)
    check_out(out, plan.options.force)
    student = plan.backbone.load(source.weights, source.preset, plan.sizes)
    part = hidden(out, ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        bundle, extremes = _write_files(part, out.name, plan, student, say)
        draw_whole(bundle.save(part), plan.engines, extremes, say)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.replace(old)
        part.replace(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.replace(out)
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return Bundle.load(out)


def check_out(out: Path, force: bool) -> None:
    """Returns where a bundle may be written to `out`; raises InputError where something is in the way, OutputError where nothing can be
    written."""
    if out.exists() and not (force and (out / MANIFEST).exists()):
        raise InputError(f"{quote(out)} exists: choose another folder, or --force to replace it if it is a bundle")
    try:
        check_place(out)
    except OSError as error:
        raise OutputError(f"cannot write {quote(out)}: {reason(error)}") from error


def _write_files(folder: Path, name: str, plan: ExportPlan, student: Student, say: Callable[[str], None]) -> tuple[Bundle, list[Extreme]]:
    """Writes all files of a bundle but its bundle.json; returns what that will say, and the prompts of the final check."""
    text = student.write_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer.of(folder / "tokenizer.json", text)
    carried = list(dict.fromkeys(text_rule(prompt, text.lowercase) for prompt in plan.options.prompts))
    say(f"encoding {len(calibration.TEXTS) + len(carried)} prompts")
    ids = {prompt: torch.from_numpy(tokenizer(prompt, truncate=prompt not in carried)) for prompt in (*calibration.TEXTS, *carried)}
    limit_ids = {} if plan.options.prompts_only else extreme_ids(tokenizer, highest_id(folder / "tokenizer.json"))
    encoded = student.encode([*ids.values(), *limit_ids.values()])
    states = dict(zip(ids, encoded, strict=False))
    extremes = [Extreme(*limit, values) for limit, values in zip(limit_ids.items(), encoded[len(ids) :], strict=True)]
    graphs = {}
    for graph in _graphs(plan, student, ids, states):
        graphs[graph.name] = write_variants(graph, plan.precision[graph.name], folder, plan.engines, say, plan.options.or_nearest)
    prompts = None
    if carried:
        prompts = write_prompts(folder, {prompt: {name: value.numpy() for name, value in states[prompt].items()} for prompt in carried})
    if plan.options.prompts_only:
        (folder / "tokenizer.json").unlink()
        text = replace(text, tokenizer=None)
    guidance = plan.guidance
    bundle = Bundle(
        name=name,
        backbone=plan.backbone.name,
        licence=plan.source.licence,
        text=text,
        latent=plan.source.latent,
        sizes=plan.sizes,
        max_batch=max(1, MAX_PIXELS // max(height * width for height, width in plan.sizes)),
        guidance=GuidancePromise(guidance.kind, Scale(guidance.default_scale, 0.0, guidance.max_scale), dict(guidance.fixed)),
        provenance={**plan.source.provenance, "exporter": f"snoopi-rt {__version__}, torch {torch.__version__}"},
        graphs=graphs,
        prompts=prompts,
        tile=_tile(plan, student),
        vocabulary=plan.options.vocabulary or student.vocabulary,
        examples=plan.options.examples or (() if plan.options.prompts_only else student.examples),
    )
    return bundle, extremes


class Reference:
    """What PyTorch makes of a student's evaluation prompts in fp32, with which its graphs are compared. Raises InputError for NaN."""

    def __init__(self, plan: ExportPlan, student: Student, states: Mapping[str, dict[str, Tensor]]):
        (height, width), latent = plan.sizes[0], plan.source.latent
        shape, renoises = (latent.channels, height // latent.factor, width // latent.factor), plan.source.preset.rule.renoises
        self.samples = calibration.generator_samples(states, plan.guidance, shape, renoises, plan.backbone.masks)
        """Inputs of the generator."""
        self._network, self._decoder = student.reference(plan.guidance, states[""]["states"]), student.decoder
        self.latents = [self.latent(sample) for sample in tqdm(self.samples.evaluation, desc="reference", unit="sample", leave=False)]
        if not all(latent.isfinite().all() for latent in self.latents):
            raise InputError("the student itself gives NaN or infinity in fp32: fetch its weights again, or choose its own --preset")

    def latent(self, sample: Mapping[str, Tensor]) -> Tensor:
        """The clean latent (1, C, h, w)."""
        return _run(self._network, sample)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """The image (1, H, W, 3) uint8."""
        return _run(self._decoder, {"latent": torch.from_numpy(latent)}).numpy()

    def comparison(self, to_latent: Callable[[int, NamedArrays], np.ndarray]) -> LatentComparison:
        """How a graph is judged whose outputs lead to a clean latent in that way."""
        return LatentComparison(to_latent, [latent.numpy() for latent in self.latents], self.decode)

    def by_text(self) -> LatentComparison:
        """How a text encoder is judged."""

        def draw(i: int, text_outputs: NamedArrays) -> np.ndarray:
            conditioning = {f"prompt_{name}": torch.from_numpy(value) for name, value in text_outputs.items()}
            return self.latent({**self.samples.evaluation[i], **conditioning}).numpy()

        return self.comparison(draw)


def _graphs(plan: ExportPlan, student: Student, ids: Mapping[str, Tensor], states: Mapping[str, dict[str, Tensor]]) -> Iterator[Graph]:
    """The graphs of a bundle, one after the other, so that the memory of one is free before the next."""
    options, reference = plan.options, Reference(plan, student, states)
    tolerance = LATENT_TOLERANCE if options.tolerance is None else options.tolerance
    padded = len({row.shape[1] for row in ids.values()}) == 1
    shared: dict[str, Any] = {"opset": plan.backbone.opset, "dynamic": dynamic_axes(plan.sizes, padded)}
    if not options.prompts_only:
        yield _text_encoder(student, ids, states, reference.by_text(), tolerance=tolerance, **shared)
    samples, by_latent = reference.samples, reference.comparison(lambda i, outputs: outputs["latent"])
    yield Graph(
        name="generator",
        module=student.generator(plan.guidance, states[""]["states"]).eval(),
        outputs=("latent",),
        example=samples.example,
        calibration=samples.calibration,
        evaluation=samples.evaluation,
        reference=[{"latent": latent} for latent in by_latent.reference],
        error=by_latent.error,
        comparison=by_latent,
        tolerance=tolerance,
        int8_tolerance=INT8_TOLERANCE if options.tolerance is None else None,
        fp32_tolerance=FP32_TOLERANCE["generator"],
        **shared,
    )
    # A larger tolerance for the latent is one for the image too.
    yield _decoder(plan, student, reference, tolerance=IMAGE_TOLERANCE * max(1.0, tolerance / LATENT_TOLERANCE), **shared)


def _text_encoder(
    student: Student, ids: Mapping[str, Tensor], states: Mapping[str, dict[str, Tensor]], comparison: LatentComparison, **shared: Any
) -> Graph:
    prompts = calibration.EVALUATION[:TEXT_SAMPLES]
    return Graph(
        name="text_encoder",
        module=student.text_encoder,
        outputs=student.text_outputs,
        example={"ids": ids[prompts[0]].expand(2, -1)},
        calibration=[{"ids": ids[prompt]} for prompt in calibration.CALIBRATION],
        evaluation=[{"ids": ids[prompt]} for prompt in prompts],
        reference=[{name: value.numpy() for name, value in states[prompt].items()} for prompt in prompts],
        error=comparison.error,
        comparison=comparison,
        fp32_tolerance=FP32_TOLERANCE["text_encoder"],
        tensor_of=student.tensor_of,
        **shared,
    )


def _decoder(plan: ExportPlan, student: Student, reference: Reference, **shared: Any) -> Graph:
    tile = _tile(plan, student)

    def first_tile(latent: Tensor) -> Tensor:
        return latent if tile is None else latent[..., : tile.size, : tile.size]

    evaluation = [first_tile(latent) for latent in reference.latents[:DECODER_SAMPLES]]
    images = [{"image": reference.decode(latent.numpy())} for latent in evaluation]
    return Graph(
        name="decoder",
        module=student.decoder,
        outputs=("image",),
        example={"latent": torch.cat([evaluation[0], evaluation[0]])},
        # The student's latents of other prompts.
        calibration=[{"latent": first_tile(reference.latent(sample))} for sample in reference.samples.calibration[:DECODER_SAMPLES]],
        evaluation=[{"latent": latent} for latent in evaluation],
        reference=images,
        error=lambda i, outputs: rms(outputs["image"].astype(np.float32) - images[i]["image"]) / 255,
        fp32_tolerance=FP32_TOLERANCE["decoder"],
        one_image=_large(student.decoder),
        **shared,
    )


def _tile(plan: ExportPlan, student: Student) -> Tile | None:
    """The tiles in which large images are decoded; None for a tiny decoder or small images."""
    factor = plan.source.latent.factor
    size = max(TILE // factor, LATENT_TILE)
    return Tile(size, min(OVERLAP, size // 2)) if _large(student.decoder) and max(map(max, plan.sizes)) > size * factor else None


def _large(decoder: nn.Module) -> bool:
    return sum(weight.numel() for weight in decoder.parameters()) > LARGE_DECODER


@torch.no_grad()
def _run(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return module(**inputs)


def dynamic_axes(sizes: Sequence[tuple[int, int]], padded: bool) -> dict[str, dict[int, str]]:
    """The dynamic axes of each input, {name: {axis: axis name}}: batch, tokens unless padded, the latent's sides if sizes differ."""
    latent = {0: "batch"}
    if len(sizes) > 1:
        latent |= {2: "height", 3: "width"}
    return {
        "ids": {0: "batch"} if padded else {0: "batch", 1: "tokens"},
        "noise": latent,
        "renoise": {0: "batch", **{axis + 1: name for axis, name in latent.items() if axis}},
        "latent": latent,
        "prompt_states": {0: "batch", 1: "tokens"},
        "prompt_mask": {0: "batch", 1: "tokens"},
        "prompt_pooled": {0: "batch"},
        "negative_states": {0: "batch", 1: "negative_tokens"},
        "negative_mask": {0: "batch", 1: "negative_tokens"},
        "negative_scale": {0: "batch"},
    }
