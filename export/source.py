"""The student to export: a preset with its settings, and where its weights come from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from snoopi_rt.bundle.bundle import Latent
from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import Weights, find_backbone
from snoopi_rt.export.backbones.network import own_side, read_latent
from snoopi_rt.export.presets.preset import Preset, override
from snoopi_rt.export.presets.rows import choose_preset
from snoopi_rt.export.presets.scheduler_check import check_scheduler, follow_scheduler
from snoopi_rt.export.weights.hub import find_weights
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
    network = weights_file
    if weights is not None:
        folder = find_weights(weights, parts=architecture.parts)
        licence = folder.licence or f"not stated in the weights; that of preset {listed.name} is {listed.licence}"
    else:
        say(f"preset {listed.name}: {listed.weights or listed.base}, licence {listed.licence}")
        if listed.non_commercial and not accept_licence:
            raise InputError(
                f"the weights of preset {listed.name} are not free for commercial use ({listed.licence}): add --accept-licence"
            )
        if not listed.weights and weights_file is None:
            raise InputError(f"the weights of preset {listed.name} are on no hub: give them as --weights or --weights-file ({listed.note})")
        licence = listed.licence
        if listed.file and network is None:
            network = find_weights(listed.weights, parts=(listed.file,)).path / listed.file
        folder = find_weights(listed.base or listed.weights, parts=architecture.parts)
    network_part = architecture.parts[0]
    if not (folder.path / network_part).is_dir() and network is None:
        raise InputError(f"{folder.path} has no {network_part}: it is not a model of backbone {architecture.name}")
    scheduler = folder.path / "scheduler"
    followed: list[str] = []
    if preset is None and weights is not None and listed.from_scheduler:
        # The user named no public student: the folder's own scheduler decides.
        followed, confirmed = follow_scheduler(chosen, scheduler, settings)
    else:
        confirmed = check_scheduler(chosen, scheduler)
    agrees = f"; its scheduler agrees on {', '.join(confirmed)}" if confirmed else ""
    follows = f"; {', '.join(followed)} as the folder's scheduler has it" if followed else ""
    say(f"rule of preset {listed.name}{''.join(f', {setting}' for setting in settings)}{agrees}{follows}")
    chosen, settings = override(chosen, followed), [*settings, *followed]
    tiny = None
    if decoder != "full":
        hub = architecture.tiny_decoder if decoder == "tiny" else decoder
        if hub is None:
            raise InputError(f"backbone {architecture.name} has no tiny decoder: leave --decoder out, or name a folder")
        tiny = find_weights(hub, parts=(".",)).path
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
    return Source(chosen, parts, latent, licence, {key: value for key, value in provenance.items() if value})


def _with_own_size(preset: Preset, settings: Sequence[str], side: int | None, factor: int, say: Callable[[str], None]) -> Preset:
    """The preset with the network's own sample size, `side` latent pixels, unless `settings` give a size."""
    by_hand = {setting.partition("=")[0] for setting in settings}
    if side is None or side * factor == preset.size or "size" in by_hand:
        return preset
    own = side * factor
    say(f"size {own}x{own}, {side} latent pixels of {factor}: what this network was made for; preset {preset.name} has {preset.size}")
    return replace(preset, size=own, time_ids=preset.time_ids if "time_ids" in by_hand else ())
