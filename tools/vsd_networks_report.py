"""What the runs of vsd_networks.py say: a table, a JSON and a plot."""

import json
import math
from pathlib import Path
from typing import Any

import click
import numpy as np

DIVERGED = 3.0
"""Times the grid's median distance."""


def report(folder: Path, architectures: list[str], settings: list[str], base_setting: str, facts: dict[str, Any], out: Path) -> None:
    """Writes the JSON and the plot of the runs in a folder, and prints the table.

    base_setting: with which the others are paired by seed; facts: what the JSON also says.
    """
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    ends = {row["architecture"]: row for row in rows if "teacher" in row}
    runs = [row for row in rows if "seed" in row]
    lines, rows = [f"{'architecture':13}{'kappa':30}{'runs':>5}{'distance':>10}{'+-':>8}{'to the mean, paired':>22}{'diverged':>9}"], []
    for name in architectures:
        distances = {(run["kappa"], run["seed"]): run.get("distance", math.inf) for run in runs if run["architecture"] == name}
        limit = DIVERGED * float(np.median(list(distances.values())))
        for setting in settings:
            own = {seed: value for (kappa, seed), value in distances.items() if kappa == setting}
            good = [value for value in own.values() if value <= limit]
            base = {seed: value for (kappa, seed), value in distances.items() if kappa == base_setting}
            pairs = [own[seed] - base[seed] for seed in own.keys() & base.keys() if max(own[seed], base[seed]) <= limit]
            row = {
                "architecture": name,
                "kappa": setting,
                "runs": len(own),
                "distance": float(np.mean(good)) if good else None,
                "half_interval": _half_interval(good),
                "to_mean": float(np.mean(pairs)) if pairs else None,
                "to_mean_half_interval": _half_interval(pairs),
                "diverged": len(own) - len(good),
            }
            rows.append(row)
            lines.append(
                f"{name:13}{setting:30}{len(own):5}{row['distance'] or math.nan:10.2f}{row['half_interval']:8.2f}"
                f"{row['to_mean'] or 0.0:13.2f} +-{row['to_mean_half_interval']:6.2f}{row['diverged']:9}"
            )
        lines.append(f"{name:13}untrained {ends[name]['untrained']:.2f}, the teacher in 25 steps {ends[name]['teacher']:.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**facts, "ends": ends, "rows": rows, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    _plot(rows, ends, out.with_suffix(".png"))
    click.echo("\n" + "\n".join(lines))


def _half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean (Student's t for up to 10 values), 0 of a single one."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    return t.get(len(values), 2.0) * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _plot(rows: list[dict[str, Any]], ends: dict[str, dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(ends)), ends, strict=True):
        mine = [row for row in rows if row["architecture"] == name and row["distance"] is not None]
        axes.errorbar(range(len(mine)), [row["distance"] for row in mine], [row["half_interval"] for row in mine], fmt="o", capsize=4)
        axes.axhline(ends[name]["teacher"], linestyle=":", color="gray", label="the teacher, 25 steps")
        axes.set_xticks(range(len(mine)), [row["kappa"] for row in mine], rotation=40, ha="right")
        axes.set(title=name, ylabel="Frechet distance, 95 % interval", ylim=(0, None))
    figure.axes[0].legend()
    figure.savefig(path, dpi=90)
