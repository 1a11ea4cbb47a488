"""What is exported: the user's choices, and the plan that they make with a student's source."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from snoopi_rt.bundle.bundle import GRAPHS
from snoopi_rt.engines import installed
from snoopi_rt.errors import EngineMissing, InputError, how_to_install
from snoopi_rt.export.backbones import Backbone, find_backbone
from snoopi_rt.export.guidance import Guidance, find_guidance
from snoopi_rt.export.onnx_graphs.variants import check_precision
from snoopi_rt.export.source import Source

MEASURED_ON = ("cpu", "openvino")


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose of a bundle. Raises InputError for unknown names and values that cannot be."""

    guidance: str | None = None
    """The kind of negative guidance; None: the preset's."""
    precision: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of precisions by graph, in the order of preference; a graph without any gets the backbone's."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels, the default first; none: the preset's."""
    tolerance: float | None = None
    """How much a variant may change the clean latent (rms); None: LATENT_TOLERANCE, and INT8_TOLERANCE for a generator in int8 by name."""
    prompts: tuple[str, ...] = ()
    """The prompts whose states are stored in the bundle."""
    prompts_only: bool = False
    """Whether to leave the text encoder out: the bundle knows `prompts` and no others."""
    force: bool = False
    """Whether to replace a bundle that is there."""
    or_nearest: frozenset[str] = frozenset()
    """The precisions that were asked for without naming a graph: a graph that cannot have one gets the nearest that it can."""

    def __post_init__(self) -> None:
        if self.guidance is not None:
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
        """The plan. Raises InputError for unknown names and impossible sizes, EngineMissing if no engine can measure parity."""
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
