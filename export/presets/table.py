"""All presets as a table, for a terminal and for docs/export.md."""

from snoopi_rt.export.presets.preset import written
from snoopi_rt.export.presets.rows import DEFAULT_PRESET, PRESETS


def table() -> str:
    """All presets as aligned lines; the default of a backbone is marked with a star."""
    rows = _rows()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown() -> str:
    """The same as a table of Markdown."""
    head, *rows = _rows()
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _rows() -> list[list[str]]:
    columns = ["preset", "backbone", "prediction", "timestep", "error grows", "size", "nasa scale", "licence", "checked against"]
    rows = [[*columns, "run with real weights"]]
    for preset in PRESETS.values():
        rows.append(
            [
                preset.name + "*" * (preset.name in DEFAULT_PRESET.values()),
                preset.backbone,
                preset.prediction,
                written(preset.timestep),
                ",".join(f"{step.error_gain:.1f}" for step in preset.rule.steps),
                str(preset.size),
                written(preset.nasa_scale),
                preset.licence.split(";")[0],
                preset.checked,
                "yes" if preset.run_with_real_weights else "no",
            ]
        )
    return rows
