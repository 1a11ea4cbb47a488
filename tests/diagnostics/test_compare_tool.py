"""tools/compare.py: what it compares, it compares fairly."""

import importlib
from pathlib import Path

import numpy as np
import pytest


def test_no_timed_call_has_a_prompt_that_was_met_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    measure = importlib.import_module("compare").measure
    met: list[tuple[str, str]] = []

    def contender(name: str) -> object:
        return lambda: lambda prompt: (met.append((name, prompt)), np.zeros(2))[1]

    rows = measure({name: contender(name) for name in ("ours", "a", "b")}, 2, lambda number: (f"a dog {number}",))
    # One prompt in common beside each contender, by which their pictures are compared, then one for each timed call.
    assert [name for name, _ in met] == ["ours", "a"] * 3 + ["ours", "b"] * 3
    assert len({prompt for _, prompt in met}) == 2 * (1 + 4) and list(rows) == ["ours", "a", "b"] and rows["a"]["error"] == 0
