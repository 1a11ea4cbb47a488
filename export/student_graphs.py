"""The graphs of a student, with PyTorch's outputs that they are compared with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt.bundle.bundle import Tile
from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import Student
from snoopi_rt.export.onnx_graphs import calibration, parity
from snoopi_rt.export.onnx_graphs.parity import LatentComparison, NamedArrays
from snoopi_rt.export.onnx_graphs.variants import Graph
from snoopi_rt.export.options import ExportPlan

TEXT_SAMPLES = 2
"""How many evaluation prompts a text encoder is judged by: each takes a whole forward pass of the generator."""
DECODER_SAMPLES = 4
LARGE_DECODER = 10_000_000
"""Parameters; TAESD has 1.2 million in its decoder, AutoencoderKL 49."""
TILE = 512
"""Pixels per side of a tile: AutoencoderKL needs 2.6 GB of activations for 512 x 512, and four times that for twice the sides."""
LATENT_TILE = 32
"""Latent pixels that it has at least: AutoencoderDC, of factor 32, draws 1024 x 1024 at once as diffusers does, its attention sees all."""
OVERLAP = 16
"""Latent pixels that two tiles share: a decoder's receptive field is counted in those."""


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


def student_graphs(
    plan: ExportPlan, student: Student, ids: Mapping[str, Tensor], states: Mapping[str, dict[str, Tensor]]
) -> Iterator[Graph]:
    """The graphs of a bundle, one after the other, so that the memory of one is free before the next."""
    options, reference = plan.options, Reference(plan, student, states)
    tolerance = parity.LATENT_TOLERANCE if options.tolerance is None else options.tolerance
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
        int8_tolerance=parity.INT8_TOLERANCE if options.tolerance is None else None,
        fp32_tolerance=parity.FP32_TOLERANCE["generator"],
        **shared,
    )
    # A larger tolerance for the latent is one for the image too.
    yield _decoder(plan, student, reference, tolerance=parity.IMAGE_TOLERANCE * max(1.0, tolerance / parity.LATENT_TOLERANCE), **shared)


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
        fp32_tolerance=parity.FP32_TOLERANCE["text_encoder"],
        tensor_of=student.tensor_of,
        **shared,
    )


def _decoder(plan: ExportPlan, student: Student, reference: Reference, **shared: Any) -> Graph:
    tile = decoder_tile(plan, student)

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
        error=lambda i, outputs: parity.rms(outputs["image"].astype(np.float32) - images[i]["image"]) / 255,
        fp32_tolerance=parity.FP32_TOLERANCE["decoder"],
        one_image=_large(student.decoder),
        **shared,
    )


def decoder_tile(plan: ExportPlan, student: Student) -> Tile | None:
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
