"""What every evaluation gives: rows with goals, as one JSON document and as one Markdown table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from snoopi_rt.export.evaluation.statistics import mean_interval, share_interval
from snoopi_rt.files import write_whole


@dataclass(frozen=True)
class Goal:
    """What a value has to be: at least, at most, or both."""

    least: float | None = None
    most: float | None = None

    def met(self, value: float | None) -> bool:
        """What could not be measured does not meet a goal."""
        if value is None or not np.isfinite(value):
            return False
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"


@dataclass(frozen=True)
class ReportRow:
    """One figure. `section` and `name` say what is measured, `unit` what the value is in; a share is of 1, None could not be measured.

    count, of: how many of how many. interval: 95 %, of the value. ceiling: the same figure of composed real images, if the value is
    relative to that. error: how often the counter itself is wrong on composed real images. detail: what else there is to tell.
    """

    section: str
    name: str
    value: float | None
    goal: Goal | None = None
    unit: str = "share"
    count: int | None = None
    of: int | None = None
    interval: tuple[float, float] | None = None
    ceiling: float | None = None
    error: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """None if there is no goal."""
        return None if self.goal is None else self.goal.met(self.value)


def share(
    section: str,
    name: str,
    right: np.ndarray,
    goal: float | None = None,
    ceiling: float | None = None,
    error: float | None = None,
    **detail: Any,
) -> ReportRow:
    """The share of the images that are right, (N,) bool; relative to `ceiling` if there is one, which is taken as exact.

    goal: at least.
    """
    whole, count = 1.0 if ceiling is None else ceiling, int(np.sum(right))
    measured = len(right) > 0 and whole > 0
    low, high = share_interval(count, len(right))
    return ReportRow(
        section,
        name,
        count / len(right) / whole if measured else None,
        None if goal is None else Goal(least=goal),
        count=count,
        of=len(right),
        interval=(low / whole, high / whole) if measured else None,
        ceiling=ceiling,
        error=error,
        detail=detail,
    )


def mean(section: str, name: str, values: np.ndarray, unit: str, goal: Goal | None = None, rounds: int = 1, **detail: Any) -> ReportRow:
    """The mean of one value per image, (N,). rounds: how often all prompts come, one round after another; the interval is over prompts."""
    if not len(values):
        return ReportRow(section, name, None, goal, unit, of=0, detail=detail)
    means = by_prompt(values, rounds)
    interval = mean_interval(means) if len(means) > 1 else None
    return ReportRow(section, name, float(np.mean(values)), goal, unit, of=len(values), interval=interval, detail=detail)


def by_prompt(values: np.ndarray, rounds: int) -> np.ndarray:
    """The mean of each prompt's values, (N / rounds,), of values (N,) of so many rounds of all prompts."""
    return np.asarray(values, np.float64).reshape(rounds, -1).mean(0)


def write(folder: Path, name: str, facts: Mapping[str, Any], columns: Mapping[str, Sequence[ReportRow]]) -> None:
    """Writes NAME.json, and NAME.md for people, to the folder. columns: the rows of each who is judged, by name."""
    document = {**facts, "judged": {who: [_as_json(row) for row in rows] for who, rows in columns.items()}}
    write_whole(folder / f"{name}.json", (json.dumps(document, indent=1) + "\n").encode())
    write_whole(folder / f"{name}.md", markdown(columns).encode())


def markdown(columns: Mapping[str, Sequence[ReportRow]]) -> str:
    """One table, a line per figure and a column per who is judged: value, how many of how many, interval, and whether the goal is met.

    Ceiling and error are the first one's: they hardly differ. Below it stands what else there is to tell.
    """
    cells = {who: {(row.section, row.name, row.unit): row for row in rows} for who, rows in columns.items()}
    keys = dict.fromkeys(key for rows in cells.values() for key in rows)
    lines = [
        f"| measure | goal | {' | '.join(columns)} | ceiling | counter's error |",
        f"|---|---|{'---|' * len(columns)}---|---|",
    ]
    for key in keys:
        rows = [cells[who].get(key) for who in columns]
        first = next(row for row in rows if row is not None)
        goal = next((str(row.goal) for row in rows if row is not None and row.goal), "")
        unit = "" if first.unit == "share" else f", {first.unit}"
        values = " | ".join("" if row is None else _cell(row) for row in rows)
        lines.append(f"| {key[0]}: {key[1]}{unit} | {goal} | {values} | {_number(first.ceiling)} | {_number(first.error)} |")
    details = [
        f"- {who}, {row.section}: {row.name}: {', '.join(f'{key} {_said(value)}' for key, value in row.detail.items())}"
        for who, rows in columns.items()
        for row in rows
        if row.detail
    ]
    return "\n".join([*lines, "", *details]) + "\n"


def unmet(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """The rows whose goal is missed."""
    return [row for row in rows if row.met is False]


def _cell(row: ReportRow) -> str:
    many = "" if row.of is None else f" ({row.of})" if row.count is None else f" ({row.count}/{row.of})"
    interval = "" if row.interval is None or row.value is None else f" [{_number(row.interval[0])}, {_number(row.interval[1])}]"
    verdict = {None: "", True: " met", False: " **missed**"}[row.met]
    return f"{_number(row.value) or 'not measured'}{many}{interval}{verdict}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _said(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"'{item}'" for item in value) or "none"
    return _number(value) if isinstance(value, int | float) else "not measured" if value is None else str(value)


def _as_json(row: ReportRow) -> dict[str, Any]:
    return {key: value for key, value in {**asdict(row), "met": row.met}.items() if value not in (None, {})}
