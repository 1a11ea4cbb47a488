"""The stages of the small model put every tensor on the accelerator: rehearsed on torch's meta device, which refuses to mix devices."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from snoopi_rt.export.small_model import decoder, redrawn, student_decoder, teacher
from snoopi_rt.export.small_model.dataset import build
from snoopi_rt.export.text import minilm
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.optimise import MasterWeights

WEIGHTS = Path(__file__).parents[2] / "weights" / "small"
META = torch.device("meta")


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes meta the default device, and reads its tensors as ones; lists the stages that did a step and drew their samples."""
    done: list[str] = []

    def run(stage: loop.Stage, parts: Mapping[str, Any], step: Callable[..., Any], sample: Callable[[Path], None]) -> None:
        stage.folder.mkdir(parents=True, exist_ok=True)
        step(0, loop.random_stream(0, 0))
        sample(stage.folder / "sample.png")
        assert {p.device for part in parts.values() for p in part.masters} == {META}
        done.append(stage.name)

    for module in (build, decoder, redrawn, student_decoder, teacher, minilm):
        monkeypatch.setattr(module, "default_device", lambda: META)
    monkeypatch.setattr(loop, "run", run)
    for module in (decoder, student_decoder, teacher):
        monkeypatch.setattr(module, "save_diffusers", lambda network, folder: None)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *parts, fused, **settings: AdamW(*parts, **settings))
    monkeypatch.setattr(MasterWeights, "averaged", lambda weights, copy: copy.eval())
    monkeypatch.setattr(Tensor, "item", lambda tensor: 1.0)
    copied = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: torch.ones_like(tensor, device="cpu") if tensor.is_meta else copied(tensor))
    return done


def test_every_stage_computes_on_the_accelerator(
    on_meta: list[str], tiny_sprites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, start = WEIGHTS / "encoder", WEIGHTS / "teacher"
    build.write_set(tmp_path / "set", tiny_sprites, encoder, count=12, seed=0)
    assert build.TrainingSet(tmp_path / "set").latents.unique().tolist() == [1.0]
    monkeypatch.setattr(decoder, "load_sprites", lambda: tiny_sprites)
    decoder.train(tmp_path / "set", encoder, tmp_path / "decoder", decoder.DecoderRecipe(batch=2))
    teacher.train(tmp_path / "set", WEIGHTS / "teacher" / "vae", tmp_path / "teacher", teacher.TeacherRecipe(batch=2), start=start)
    few = student_decoder.StudentDecoderRecipe(batch=4, images=12, adversarial_from=0.0)
    student_decoder.train(start, start, tmp_path / "set", tmp_path / "tuned", few)
    assert on_meta == ["decoder", "teacher", "student decoder"]
