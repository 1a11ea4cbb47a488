"""A student's weights to a bundle: load, write graphs, measure, promise; in that order."""

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
from snoopi_rt.engines import installed
from snoopi_rt.errors import EngineMissing, InputError, OutputError, how_to_install
from snoopi_rt.export.backbones import Backbone, Student, find_backbone
from snoopi_rt.export.final_check import Extreme, draw_whole, extreme_ids
from snoopi_rt.export.guidance import Guidance, find_guidance
from snoopi_rt.export.onnx_graphs import calibration
from snoopi_rt.export.onnx_graphs.parity import FP32_TOLERANCE, LATENT_TOLERANCE, PICTURE_TOLERANCE, Arrays, View, rms
from snoopi_rt.export.onnx_graphs.variants import Graph, build, check_precision
from snoopi_rt.export.source import Source
from snoopi_rt.files import check_place, hidden, reason
from snoopi_rt.prompt_encoder import write_prompts
from snoopi_rt.shell import quote
from snoopi_rt.tokenizer import Tokenizer, highest_id

MEASURED_ON = ("cpu", "openvino")
MAX_PIXELS = 64 * 128**2
"""Of all images of a batch, which bounds its memory: 4 images of 512 x 512."""
TEXT_CASES = 2
"""How many scored prompts a text encoder is judged by: each takes a whole forward of the generator."""
DECODER_CASES = 4
TINY = 10_000_000
"""Parameters; TAESD has 1.2 million in its decoder, AutoencoderKL 49."""
TILE, OVERLAP = 512, 16
"""Pixels a side of a tile: AutoencoderKL needs 2.6 GB of activations for 512 x 512, and four times that for twice the sides. And how many
latent pixels two tiles share: what a decoder sees around one is counted in those."""


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose of a bundle. `precision`: names by graph, in the order of preference; none: the backbone's.

    `everywhere`: those of them that name no graph, for which a graph that cannot have one gets the nearest that it can have.
    `sizes`: (height, width), the first is the default; none: the preset's. `prompts`: those whose states the bundle carries;
    `prompts_only` leaves the text encoder out. `vocabulary`, `examples`: as in Bundle; none: the student's.
    """

    guidance: str = "nasa"
    precision: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    tolerance: float = LATENT_TOLERANCE
    prompts: tuple[str, ...] = ()
    prompts_only: bool = False
    force: bool = False
    vocabulary: Vocabulary | None = None
    examples: tuple[str, ...] = ()
    everywhere: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        find_guidance(self.guidance)
        for name in (name for names in self.precision.values() for name in names):
            check_precision(name)
        if not 0 < self.tolerance < math.inf:
            raise InputError(f"tolerance {self.tolerance:g} is not a positive number")
        if self.prompts_only and not self.prompts:
            raise InputError("a bundle without text encoder needs the prompts that it shall know: --prompts FILE")


@dataclass(frozen=True)
class Plan:
    """What is exported, all of it checked before anything is loaded."""

    source: Source
    options: ExportOptions
    backbone: Backbone
    guidance: Guidance
    sizes: tuple[tuple[int, int], ...]
    precision: Mapping[str, Sequence[str]]
    engines: tuple[str, ...]

    @classmethod
    def of(cls, source: Source, options: ExportOptions) -> "Plan":
        """The plan; raises InputError for names that are not known and sizes that cannot be, EngineMissing where nothing can measure."""
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
    """Writes a student to the bundle `out` and returns it; `say` is told what was measured.

    Raises InputError (unknown names, weights that do not fit, `out` in use), OutputError where a graph is too far from PyTorch or the whole
    bundle does not draw what it promises.
    Nothing is under the name `out` until all of it is; with `force` an old bundle there is replaced.
    """
    plan = Plan.of(source, options or ExportOptions())
    old = hidden(out, ".old")
    if old.exists() and not out.exists():  # killed between two renames
        old.replace(out)
    check_out(out, plan.options.force)
    student = plan.backbone.load(source.weights, source.preset, plan.sizes)
    beside = hidden(out, ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        bundle, extremes = _fill(beside, out.name, plan, student, say)
        draw_whole(bundle.save(beside), plan.engines, extremes, say)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.replace(old)
        beside.replace(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.replace(out)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return Bundle.load(out)


def check_out(out: Path, force: bool) -> None:
    """Returns where a bundle may be written to `out`; raises InputError where something else is there, OutputError where nothing can be."""
    if out.exists() and not (force and (out / MANIFEST).exists()):
        raise InputError(f"{quote(out)} exists: choose another folder, or --force to replace it if it is a bundle")
    try:
        check_place(out)
    except OSError as error:
        raise OutputError(f"cannot write {quote(out)}: {reason(error)}") from error


def _fill(folder: Path, name: str, plan: Plan, student: Student, say: Callable[[str], None]) -> tuple[Bundle, list[Extreme]]:
    """All files of a bundle but its bundle.json, which is returned, with the prompts from which it is to be drawn before it is done."""
    text = student.write_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer(folder / "tokenizer.json", text.max_tokens, text.lowercase, text.pad)
    carried = list(dict.fromkeys(text_rule(prompt, text.lowercase) for prompt in plan.options.prompts))
    say(f"encoding {len(calibration.TEXTS) + len(carried)} prompts")
    ids = {prompt: torch.from_numpy(tokenizer(prompt, truncate=prompt not in carried)) for prompt in (*calibration.TEXTS, *carried)}
    limits = {} if plan.options.prompts_only else extreme_ids(tokenizer, highest_id(folder / "tokenizer.json"))
    encoded = student.encode([*ids.values(), *limits.values()])
    states = dict(zip(ids, encoded, strict=False))
    extremes = [Extreme(*limit, values) for limit, values in zip(limits.items(), encoded[len(ids) :], strict=True)]
    graphs = {}
    for graph in _graphs(plan, student, ids, states):
        graphs[graph.name] = build(graph, plan.precision[graph.name], folder, plan.engines, say, plan.options.everywhere)
    prompts = None
    if carried:
        prompts = write_prompts(folder, {each: {key: value.numpy() for key, value in states[each].items()} for each in carried})
    if plan.options.prompts_only:
        (folder / "tokenizer.json").unlink()
        text = replace(text, tokenizer=None)
    kind = plan.guidance
    bundle = Bundle(
        name=name,
        backbone=plan.backbone.name,
        licence=plan.source.licence,
        text=text,
        latent=plan.source.latent,
        sizes=plan.sizes,
        max_batch=max(1, MAX_PIXELS // max(height * width for height, width in plan.sizes)),
        guidance=GuidancePromise(kind.kind, Scale(kind.default_scale, 0.0, kind.max_scale), dict(kind.fixed)),
        provenance={**plan.source.provenance, "exporter": f"snoopi-rt {__version__}, torch {torch.__version__}"},
        graphs=graphs,
        prompts=prompts,
        tile=_tile(plan, student),
        vocabulary=plan.options.vocabulary or student.vocabulary,
        examples=plan.options.examples or (() if plan.options.prompts_only else student.examples),
    )
    return bundle, extremes


def _graphs(plan: Plan, student: Student, ids: Mapping[str, Tensor], states: Mapping[str, dict[str, Tensor]]) -> Iterator[Graph]:
    """What there is to build, one after the other, so that what one needs is gone before the next."""
    options, backbone = plan.options, plan.backbone
    (height, width), latent = plan.sizes[0], plan.source.latent
    shape, steps = (latent.channels, height // latent.factor, width // latent.factor), len(plan.source.preset.rule.steps)
    given = calibration.generator_cases(states, plan.guidance, shape, steps, backbone.masks)
    reference = student.reference(plan.guidance, states[""]["states"])
    latents = [_run(reference, case) for case in tqdm(given.scored, desc="reference", unit="case", leave=False)]
    if not all(latent.isfinite().all() for latent in latents):
        raise InputError("the student itself gives NaN or infinity in fp32: fetch its weights again, or choose its own --preset")
    wanted = [{"latent": latent.numpy()} for latent in latents]

    def from_text(i: int, found: Arrays) -> np.ndarray:
        return _run(reference, {**given.scored[i], **{f"prompt_{name}": torch.from_numpy(value) for name, value in found.items()}}).numpy()

    def picture(latent: np.ndarray) -> np.ndarray:
        return _run(student.decoder, {"latent": torch.from_numpy(latent)}).numpy()

    seen = [latent.numpy() for latent in latents]
    by_text, by_latent = View(from_text, seen, picture), View(lambda i, found: found["latent"], seen, picture)
    padded = len({row.shape[1] for row in ids.values()}) == 1
    shared: dict[str, Any] = {"opset": backbone.opset, "dynamic": dynamic_axes(plan.sizes, padded)}
    if not options.prompts_only:
        prompts = calibration.SCORED[:TEXT_CASES]
        yield Graph(
            name="text_encoder",
            module=student.text_encoder,
            outputs=student.text_outputs,
            example={"ids": ids[prompts[0]].expand(2, -1)},
            calibration=[{"ids": ids[prompt]} for prompt in calibration.CALIBRATION],
            scored=[{"ids": ids[prompt]} for prompt in prompts],
            wanted=[{name: value.numpy() for name, value in states[prompt].items()} for prompt in prompts],
            error=by_text.error,
            view=by_text,
            tolerance=options.tolerance,
            fp32_tolerance=FP32_TOLERANCE["text_encoder"],
            tensor_of=student.tensor_of,
            **shared,
        )
    yield Graph(
        name="generator",
        module=student.generator(plan.guidance, states[""]["states"]).eval(),
        outputs=("latent",),
        example=given.example,
        calibration=given.calibration,
        scored=given.scored,
        wanted=wanted,
        error=by_latent.error,
        view=by_latent,
        tolerance=options.tolerance,
        fp32_tolerance=FP32_TOLERANCE["generator"],
        **shared,
    )
    tile = _tile(plan, student)

    def part(latent: Tensor) -> Tensor:
        return latent if tile is None else latent[..., : tile.size, : tile.size]

    scored = [part(latent) for latent in latents[:DECODER_CASES]]
    images = [{"image": picture(latent.numpy())} for latent in scored]
    yield Graph(
        name="decoder",
        module=student.decoder,
        outputs=("image",),
        example={"latent": torch.cat([scored[0], scored[0]])},
        # The student's pictures of other prompts.
        calibration=[{"latent": part(_run(reference, case))} for case in given.calibration[:DECODER_CASES]],
        scored=[{"latent": latent} for latent in scored],
        wanted=images,
        error=lambda i, found: rms(found["image"].astype(np.float32) - images[i]["image"]) / 255,
        # Whoever lets the latent change more lets the picture.
        tolerance=PICTURE_TOLERANCE * max(1.0, options.tolerance / LATENT_TOLERANCE),
        fp32_tolerance=FP32_TOLERANCE["decoder"],
        alone=_large(student.decoder),
        **shared,
    )


def _tile(plan: Plan, student: Student) -> Tile | None:
    """The tiles in which large pictures are decoded, unless the decoder is a tiny one."""
    size = TILE // plan.source.latent.factor
    return Tile(size, min(OVERLAP, size // 2)) if _large(student.decoder) and max(map(max, plan.sizes)) > TILE else None


def _large(decoder: nn.Module) -> bool:
    return sum(weight.numel() for weight in decoder.parameters()) > TINY


@torch.no_grad()
def _run(module: nn.Module, case: Mapping[str, Tensor]) -> Tensor:
    return module(**case)


def dynamic_axes(sizes: Sequence[tuple[int, int]], padded: bool) -> dict[str, dict[int, str]]:
    """The free axes of each input: batch, tokens unless they are padded, and the latent's sides where there are several sizes."""
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
