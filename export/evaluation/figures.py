"""Rows as bars: every figure with its interval, its ceiling's share and its goal."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snoopi_rt.export.evaluation.report import ReportRow


def plot(columns: Mapping[str, Sequence[ReportRow]], path: Path) -> None:
    """Writes one plot with a panel per section and unit; columns: the rows of each who is judged."""
    panels: dict[tuple[str, str], dict[str, dict[str, ReportRow]]] = {}
    for who, rows in columns.items():
        for row in rows:
            if row.value is not None:
                panels.setdefault((row.section, row.unit), {}).setdefault(row.name, {})[who] = row
    heights = [0.6 + 0.3 * len(bars) for bars in panels.values()]
    figure = _figure_class()(figsize=(11, 0.8 * len(panels) + sum(heights)), layout="constrained")
    places = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, ((section, unit), bars) in zip(places, panels.items(), strict=True):
        for number, who in enumerate(columns):
            _bars(axes, [rows.get(who) for rows in bars.values()], number, len(columns), who)
        axes.set_title(section if unit == "share" else f"{section}, {unit}", fontsize=9, loc="left")
        axes.set_yticks(range(len(bars)), list(bars), fontsize=7)
        axes.invert_yaxis()
    places[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def plot_tradeoff(curves: Mapping[str, Sequence[tuple[float, float, float]]], path: Path) -> None:
    """Writes what is removed against what is kept, a line per student; curves: (scale, removed, kept) of each."""
    figure = _figure_class()(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot([removed for _, removed, _ in points], [kept for _, _, kept in points], marker="o", label=name)
        for scale, removed, kept in points:
            axes.annotate(f"{scale:g}", (removed, kept), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel("unwanted thing removed, of pictures that showed it")
    axes.set_ylabel("prompt recognised, of what it is without a negative")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def _bars(axes: Any, rows: Sequence[ReportRow | None], number: int, of: int, label: str) -> None:
    """Bars `number` of so many beside each other, with intervals, and a line where a goal is."""
    width = 0.8 / of
    heights = {i + (number - (of - 1) / 2) * width: row for i, row in enumerate(rows) if row is not None}
    axes.barh(list(heights), [row.value for row in heights.values()], width, label=label, color=f"C{number}")
    for y, row in heights.items():
        if row.interval is not None:
            axes.plot(row.interval, [y, y], color="black", linewidth=1)
        for limit in () if row.goal is None else (row.goal.least, row.goal.most):
            if limit is not None:
                axes.plot([limit, limit], [y - width / 2, y + width / 2], color="green" if row.met else "red", linewidth=2)


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
