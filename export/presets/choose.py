"""The preset that a user means: by its own name, or by its backbone's."""

from snoopi_rt.errors import InputError
from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.presets.rows import DEFAULT_PRESET, PRESETS


def find_preset(name: str, backbone: str | None = None) -> Preset:
    """The preset of that name. Raises InputError, naming the known ones, also if it is for another backbone than `backbone`."""
    known = [preset for preset in PRESETS.values() if backbone in (None, preset.backbone)]
    if name in PRESETS and PRESETS[name] in known:
        return PRESETS[name]
    wrong = f"preset {name!r} is for backbone {PRESETS[name].backbone}, not {backbone}" if name in PRESETS else f"unknown preset {name!r}"
    raise InputError(f"{wrong}, choose from {', '.join(preset.name for preset in known) or 'none'}")


def default_preset(backbone: str) -> Preset:
    """The default preset of a backbone. Raises InputError, naming the known ones."""
    if backbone not in DEFAULT_PRESET:
        raise InputError(f"unknown backbone {backbone!r}, choose from {', '.join(DEFAULT_PRESET)}")
    return PRESETS[DEFAULT_PRESET[backbone]]


def choose_preset(backbone: str | None, preset: str | None) -> Preset:
    """The preset of that name, else the backbone's default. Raises InputError for unknown names, and if neither is given."""
    if preset is not None:
        return find_preset(preset, backbone)
    if backbone is None:
        raise InputError("nothing to export: give --backbone NAME or --preset NAME")
    return default_preset(backbone)
