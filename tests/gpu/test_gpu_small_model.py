"""What tools/gpu_small_model.py brings home of a stage that its time stopped."""

import json
import runpy
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "gpu_small_model.py"))


def test_a_stopped_stage_comes_back_as_its_moving_average(tmp_path: Path) -> None:
    stages = TOOL["Stages"](tmp_path / "work", tmp_path, 64, 4, True, time.monotonic() + 60)
    (tmp_path / "work" / "teacher" / "checkpoints").mkdir(parents=True)
    average = torch.randn(3000, 3000)
    tensors = {"teacher/average.weight": average, "teacher/master.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "work" / "teacher" / "checkpoints" / "0000007.safetensors")
    (tmp_path / "work" / "teacher" / "log.jsonl").write_text('{"step": 6, "loss": 1.0}\n')
    stages.bring_back()
    parts = sorted(tmp_path.glob("teacher.part-*"))
    assert len(parts) == 2
    assert torch.equal(load(b"".join(part.read_bytes() for part in parts))["weight"], average.half())
    assert json.loads((tmp_path / "report.json").read_text())["teacher"]["last"]["step"] == 6


def test_a_signal_that_came_in_a_stages_last_step_ends_the_run(tmp_path: Path) -> None:
    stages, done = TOOL["Stages"](tmp_path / "work", tmp_path, 64, 4, True, time.monotonic() + 60), []
    stages._signals = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        stages._timed("teacher", lambda: done.append(1))
    assert done == [1] and stages.report["teacher"]["seconds"] >= 0
