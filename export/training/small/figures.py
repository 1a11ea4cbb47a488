"""An evaluation as one picture: what was asked for, what a negative leaves and keeps, and how that depends on its scale."""

import os
import tempfile
from pathlib import Path
from typing import Any


def plot(document: dict[str, Any], bundles: list[str], path: Path) -> None:
    """Writes the picture of a document that report.evaluate made."""
    figure = _figure_class()(figsize=(15, 13), layout="constrained")
    places = figure.subplot_mosaic([["top", "sweeps", "costs"], ["removal"] * 3, ["kept"] * 3])
    top, sweeps, costs, removal, kept = (places[name] for name in ("top", "sweeps", "costs", "removal", "kept"))
    first = document["bundles"][bundles[0]]
    who = {bundles[0]: first["asked"], "teacher": document["teacher"]["asked"]}
    for number, (name, figures) in enumerate(who.items()):
        _bars(top, figures, number, len(who), name)
    top.set_title("held-out captions: share that shows what was asked")
    for name in bundles:
        found = document["bundles"][name]
        rows, label = found["sweep"], f"{found['guidance']}, up to {found['largest']:g}"
        scales, left = [float(scale) / found["largest"] for scale in rows], [row["left"] for row in rows.values()]
        (line,) = sweeps.plot(scales, left, marker="o", label=label)
        sweeps.plot(scales, [row["kept"] for row in rows.values()], linestyle="--", color=line.get_color())
        costs.plot([row["unrelated"] for row in rows.values()], left, marker="o", color=line.get_color(), label=label)
    sweeps.set(title="flaw left, and dashed the thing kept (tuning seeds)", xlabel="scale, of the kind's largest", ylim=(0, 1.1))
    costs.set(title="what that costs", xlabel="levels that an unrelated negative moves", ylabel="flaw left", ylim=(0, 1.1))
    rows = {f"{row['negative']}{'' if row['asked'] else ', unasked'} ({row['found']})": row for row in first["removal"] if row["found"]}
    _bars(removal, {name: row["left"] for name, row in rows.items()}, 0, 1, "left")
    removal.set_title("share that still shows it under the negative (pictures)")
    for number, what in enumerate(("kept thing", "kept other thing", "kept background")):
        shares = {name: row[what]["relative"] if what in row else None for name, row in rows.items()}
        _bars(
            kept, {name: None if value is None else {"share": value, "interval": None} for name, value in shares.items()}, number, 3, what
        )
    kept.set_title("kept, of what an unrelated negative keeps")
    kept.autoscale(axis="y")
    for axes in (top, sweeps, costs, kept):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def _bars(axes: Any, figures: dict[str, dict[str, Any] | None], number: int, of: int, label: str) -> None:
    """Bars `number` of so many beside each other, one for each figure that is not None."""
    width, there = 0.8 / of, {place: figure for place, figure in enumerate(figures.values()) if figure is not None}
    places = [place + (number - (of - 1) / 2) * width for place in there]
    axes.bar(places, [figure["share"] for figure in there.values()], width, label=label, color=f"C{number}")
    for place, figure in zip(places, there.values(), strict=True):
        if figure["interval"] is not None:
            axes.plot([place, place], figure["interval"], color="black", linewidth=1)
    axes.set_xticks(range(len(figures)), list(figures), rotation=60, ha="right", fontsize=7)
    axes.set(xlim=(-0.6, len(figures) - 0.4), ylim=(0, 1.1))


def _figure_class() -> Any:
    """Matplotlib's Figure. Its list of fonts, which it would leave in the user's folders, goes to one that is removed."""
    before = os.environ.get("MPLCONFIGDIR")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MPLCONFIGDIR"] = before or scratch
        try:
            from matplotlib.figure import Figure
        finally:
            if before is None:
                del os.environ["MPLCONFIGDIR"]
    return Figure
