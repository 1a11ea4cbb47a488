"""The student to export: a preset with its settings, and where its weights come from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from snoopi_rt.bundle.bundle import Latent
from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import Weights, find_backbone
from snoopi_rt.export.backbones.network import own_side, read_latent
from snoopi_rt.export.presets.choose import choose_preset
from snoopi_rt.export.presets.preset import Preset, override
from snoopi_rt.export.presets.scheduler_check import check_scheduler, follow_scheduler
from snoopi_rt.export.weights.hub import ModelFile, WeightsFolder, find_weights, list_weights
from snoopi_rt.export.weights.lora import parse_lora


@dataclass(frozen=True)
class Source:
    """A student before it is exported."""

    preset: Preset
    weights: Weights
    latent: Latent
    """What its network gives and its decoder takes."""
    licence: str
    provenance: dict[str, str]
    """Where it comes from, as the bundle records it."""


@dataclass(frozen=True)
class Fetch:
    """Files of one folder or hub model that an export reads; the fields are find_weights' arguments."""

    weights: str
    parts: tuple[str, ...]
    replaced: tuple[str, ...] = ()


def fetches(listed: Preset, weights: str | None = None, weights_file: Path | None = None, decoder: str = "full") -> dict[str, Fetch]:
    """What an export reads from folders and hub models: `folder`, and if they apply `network`, `lora` and `decoder`.

    Raises InputError if the preset's weights are on no hub, and for a backbone without a tiny decoder.
    """
    architecture, sources = find_backbone(listed.backbone), {}
    network = weights_file is not None
    place = weights or listed.base or listed.weights
    if not place and network:
        raise InputError(f"preset {listed.name} is on no hub, and --weights-file is its network alone: give its folder as --weights, too")
    if weights is None:
        if not listed.weights and not network:
            raise InputError(f"the weights of preset {listed.name} are on no hub: give them as --weights or --weights-file ({listed.note})")
        if listed.file and not network:
            sources["network"], network = Fetch(listed.weights, (listed.file,)), True
        if listed.lora:
            sources["lora"] = Fetch(listed.weights, (listed.lora,))
    replaced = (architecture.parts[0],) * network + ("vae",) * (decoder != "full")
    sources["folder"] = Fetch(place, architecture.parts, replaced)
    if decoder != "full":
        hub = architecture.tiny_decoder if decoder == "tiny" else decoder
        if hub is None:
            raise InputError(f"backbone {architecture.name} has no tiny decoder: leave --decoder out, or name a folder")
        sources["decoder"] = Fetch(hub, (".",))
    return sources


def list_files(
    backbone: str | None = None,
    weights: str | None = None,
    preset: str | None = None,
    weights_file: Path | None = None,
    decoder: str = "full",
) -> dict[str, list[ModelFile]]:
    """The files that find_source would read with these arguments, by folder or hub model; nothing is fetched. Raises what it does."""
    listed: dict[str, list[ModelFile]] = {}
    for source in fetches(choose_preset(backbone, preset), weights, weights_file, decoder).values():
        listed.setdefault(source.weights, []).extend(list_weights(source.weights, source.parts, source.replaced))
    return {name: list(dict.fromkeys(files)) for name, files in listed.items()}


def find_source(
    backbone: str | None = None,
    weights: str | None = None,
    preset: str | None = None,
    settings: Sequence[str] = (),
    weights_file: Path | None = None,
    loras: Sequence[str] = (),
    decoder: str = "full",
    accept_licence: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Source:
    """The student to export, its weights on this machine. `say` gets a line for what was chosen.

    weights: a folder or hub id; None: the preset's own. Without a preset, the scheduler in `weights` corrects the backbone's default one.
    decoder: "full" (the folder's vae), "tiny" (the backbone's TAESD), or the folder or hub id of one. Raises InputError for unknown names,
    contradictory arguments and a licence that must be accepted, and whatever find_weights raises.
    """
    listed = choose_preset(backbone, preset)
    chosen, merged = override(listed, settings), tuple(parse_lora(lora) for lora in loras)
    architecture = find_backbone(chosen.backbone)
    if weights_file is not None and not weights_file.exists():
        raise InputError(f"no weights file {weights_file}")
    if weights is None:
        say(f"preset {listed.name}: {listed.weights or listed.base}, licence {listed.licence}")
        if listed.non_commercial and not accept_licence:
            raise InputError(
                f"the weights of preset {listed.name} are not free for commercial use ({listed.licence}): add --accept-licence"
            )
    sources = fetches(listed, weights, weights_file, decoder)
    fetched = {name: find_weights(source.weights, source.parts, source.replaced) for name, source in sources.items()}
    folder, network = fetched["folder"], weights_file
    if "network" in fetched:
        network = _only(fetched["network"], listed.file)
    if "lora" in fetched:
        merged = ((_only(fetched["lora"], listed.lora), 1.0), *merged)
    network_part = architecture.parts[0]
    if not (folder.path / network_part).is_dir() and network is None:
        raise InputError(f"{folder.path} has no {network_part}: it is not a model of backbone {architecture.name}")
    # If the row does not know better, or the user named no public student, the folder's own scheduler decides.
    follows = listed.follows_scheduler or (preset is None and weights is not None and bool(listed.from_scheduler))
    settings = [*settings, *_followed(chosen, folder.path / "scheduler", settings, follows, say)]
    chosen = override(listed, settings)
    tiny = fetched["decoder"].path if "decoder" in fetched else None
    parts = Weights(folder.path, network, merged, tiny)
    latent = read_latent(parts, network_part)
    chosen = _with_own_size(chosen, settings, own_side(parts, network_part), latent.factor, say)
    provenance = {
        "weights": folder.name,
        "revision": folder.revision or "",
        "weights_file": network.name if network else "",
        "loras": ", ".join(f"{file.name}:{weight:g}" for file, weight in merged),
        "decoder": "" if tiny is None else decoder,
        "preset": " ".join([listed.name, *settings]),
    }
    licence = listed.licence if weights is None else folder.licence
    stated = licence or f"{listed.licence}, as preset {listed.name} says (the weights state none)"
    return Source(chosen, parts, latent, stated, {key: value for key, value in provenance.items() if value})


def _followed(preset: Preset, scheduler: Path, settings: Sequence[str], follows: bool, say: Callable[[str], None]) -> list[str]:
    """The further settings by which the preset agrees with the scheduler in that folder, none unless it `follows` it. Raises InputError
    if it does not and they contradict each other."""
    followed, confirmed = follow_scheduler(preset, scheduler, settings) if follows else ([], check_scheduler(preset, scheduler))
    agrees = f"; its scheduler agrees on {', '.join(confirmed)}" if confirmed else ""
    as_there = f"; {', '.join(followed)} as the folder's scheduler has it" if followed else ""
    say(f"rule of preset {preset.name}{''.join(f', {setting}' for setting in settings)}{agrees}{as_there}")
    return followed


def _only(model: WeightsFolder, pattern: str) -> Path:
    """The file or folder of that name or pattern; raises InputError if not one of the model's files fits it."""
    paths = [model.path] if pattern == "." else sorted(model.path.glob(pattern))
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        raise InputError(f"{model.name} should have one {pattern}, it has {names}: give the right one as --weights-file")
    return paths[0]


def _with_own_size(preset: Preset, settings: Sequence[str], side: int | None, factor: int, say: Callable[[str], None]) -> Preset:
    """The preset with the network's own sample size, `side` latent pixels, unless `settings` give a size."""
    by_hand = {setting.partition("=")[0] for setting in settings}
    if side is None or side * factor == preset.size or "size" in by_hand:
        return preset
    own = side * factor
    say(f"size {own}x{own}, {side} latent pixels of {factor}: what this network was made for; preset {preset.name} has {preset.size}")
    return replace(preset, size=own)
