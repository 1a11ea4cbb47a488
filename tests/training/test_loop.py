"""The training loop and its optimisers: stages resume exactly after a kill and stop on NaN."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.export.settings import flattened
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.loop import Stage, StageRecipe, run
from snoopi_rt.export.training.optimise import MasterWeights, learning_rate
from snoopi_rt.export.training.recipe import StudentRecipe
from snoopi_rt.export.training.recipes import FORMER_NAMES
from snoopi_rt.files import alone
from snoopi_rt.interrupts import Interrupted


def tiny_stage(
    folder: Path,
    steps: int = 8,
    kill_at: int | None = None,
    poison_at: int | None = None,
    lr: float = 1e-2,
    by: int = signal.SIGKILL,
    processes: Any = None,
) -> None:
    """A stage of a bf16 network of 9 parameters; may send its own process a signal or meet a NaN."""
    torch.manual_seed(0)
    network = nn.Linear(8, 1).bfloat16()
    weights = MasterWeights(network)

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        if i == kill_at:
            os.kill(os.getpid(), by)
        x = torch.randn(16, 8, generator=random).bfloat16()
        loss = (network(x).float() - x.float().sum(1, keepdim=True)).square().mean()
        loss.backward()
        weights.step(lr)
        return {"loss": float("nan") if i == poison_at else loss.item()}

    stage = Stage("tiny", folder, StageRecipe(steps, 16, lr), {"data": "abc"}, sample_every=4)
    loop.SAVE_EVERY_S, loop.SAVE_SHARE = 0.0, 0
    run(stage, {"network": weights}, step, picture, processes)


def picture(path: Path) -> None:
    Image.new("RGB", (4, 4)).save(path)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_resumes_to_the_same_losses_bit_for_bit(tmp_path):
    tiny_stage(tmp_path / "unbroken")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\nfrom test_loop import tiny_stage\n"
    killed = subprocess.run(
        [sys.executable, "-c", f"{code}tiny_stage(Path({str(tmp_path / 'killed')!r}), kill_at=5)"], check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    tiny_stage(tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    assert len(losses(tmp_path / "killed")) == 8


def test_a_run_that_is_told_to_end_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_stage(tmp_path / "unbroken")
    code = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_loop import loop, run, tiny_stage
from snoopi_rt.export.training.recipe import StudentRecipe
from snoopi_rt.export.training.recipes import FORMER_NAMES
from snoopi_rt.interrupts import Interrupted, interruptible
with interruptible():
    try:
        tiny_stage(Path({str(tmp_path / "ended")!r}), kill_at=5, by=signal.SIGTERM)
    except Interrupted as signalled:
        sys.exit(signalled.code)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, encoding="utf-8")
    assert ended.returncode == 128 + signal.SIGTERM and "tiny stopped after 6 of 8 steps" in ended.stderr, ended.stderr
    assert len(losses(tmp_path / "ended")) == 6
    shorter = shutil.copytree(tmp_path / "ended", tmp_path / "shorter")
    tiny_stage(shorter, steps=7)
    assert losses(shorter)[:6] == losses(tmp_path / "ended") and len(losses(shorter)) == 7
    tiny_stage(tmp_path / "ended")
    assert losses(tmp_path / "ended") == losses(tmp_path / "unbroken")


@pytest.mark.parametrize("main", [True, False])
def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path: Path, main: bool) -> None:
    own: list[int] = []

    def largest(code: int) -> int:
        own.append(code)
        return 128 + signal.SIGTERM if len(own) == 3 else code

    with pytest.raises(Interrupted) as ended:
        tiny_stage(tmp_path, processes=SimpleNamespace(main=main, largest=largest))
    assert ended.value.code == 128 + signal.SIGTERM and own == [0, 0, 0]
    assert (tmp_path / "checkpoints" / "0000003.safetensors").exists() == main


def test_a_finished_stage_run_again_does_nothing_more(tmp_path):
    tiny_stage(tmp_path)
    before = losses(tmp_path)
    tiny_stage(tmp_path)
    assert losses(tmp_path) == before


def test_a_finished_stage_goes_on_when_told_more_steps_but_not_fewer(tmp_path):
    tiny_stage(tmp_path)
    before = losses(tmp_path)
    tiny_stage(tmp_path, steps=10)
    assert losses(tmp_path)[:8] == before
    assert len(losses(tmp_path)) == 10
    with pytest.raises(InputError, match="holds a tiny after 10 steps, more than 9: give at least as many"):
        tiny_stage(tmp_path, steps=9)


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    tiny_stage(tmp_path)
    with pytest.raises(InputError, match=r"lr 0.01 -> 0.02"):
        tiny_stage(tmp_path, lr=2e-2)


def test_two_runs_at_once_do_not_share_a_folder(tmp_path):
    with alone(tmp_path, "training"), pytest.raises(OutputError, match=r"^another process is training into "):
        tiny_stage(tmp_path)
    tiny_stage(tmp_path)


def test_without_locks_a_run_goes_on(tmp_path, monkeypatch):
    def acquire(self: FileLock) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    tiny_stage(tmp_path)
    assert len(losses(tmp_path)) == 8


def test_nan_stops_the_run_with_its_step_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(OutputError, match="stopped at step 5: loss is not finite"):
        tiny_stage(tmp_path, poison_at=5)
    tiny_stage(tmp_path)
    assert len(losses(tmp_path)) == 8
    with pytest.raises(OutputError, match=r"stopped at step 0: loss is not finite$"):  # no checkpoint is promised that is not there
        tiny_stage(tmp_path / "first", poison_at=0)


def test_masters_keep_updates_that_bf16_would_lose():
    network = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(network.weight)
    weights = MasterWeights(network, weight_decay=0.0)
    for _ in range(8):
        network.weight.grad = torch.ones_like(network.weight)
        weights.step(1e-4)  # bf16 has no number between 1 and 0.996
    assert weights.masters[0].item() == pytest.approx(1 - 8e-4, rel=1e-4)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(1.0, i, 1000, warmup=100, decay_from=0.5) for i in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and rates[499] == 1.0
    assert rates[-1] < 1e-4 and rates == [*sorted(rates[:100]), *sorted(rates[100:], reverse=True)]


def test_a_network_whose_channels_lie_last_learns_as_any_other():
    def trained(memory_format: torch.memory_format) -> torch.Tensor:
        torch.manual_seed(0)
        network = nn.Conv2d(4, 6, 3)
        weights = MasterWeights(network)
        network.to(memory_format=memory_format)
        for _ in range(3):
            x = torch.arange(200.0).view(2, 4, 5, 5).sin().contiguous(memory_format=memory_format)
            (network(x) ** 3).sum().backward()
            weights.step(1e-2)
        return network.weight.detach().contiguous()

    torch.testing.assert_close(trained(torch.channels_last), trained(torch.contiguous_format))


def test_muon_steps_matrices_of_blocks_and_resumes_exactly():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks, self.out = nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.transformer_blocks[0](x)))

    def steps(weights: MasterWeights, network: nn.Module, numbers: range) -> None:
        for i in numbers:
            network(torch.randn(4, 8, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            weights.step(1e-2)

    torch.manual_seed(0)
    network = Network()
    start = copy.deepcopy(network.state_dict())
    weights = MasterWeights(network, muon=True)
    assert [len(part) for part, _ in weights.muons] == [1] and sum(len(part) for part, _ in weights.adams) == 3
    steps(weights, network, range(3))
    kept = {name: value.clone() for name, value in weights.state().items()}
    steps(weights, network, range(3, 6))
    other = Network()
    other.load_state_dict(start)
    again = MasterWeights(other, muon=True)
    again.restore(kept)
    steps(again, other, range(3, 6))
    assert all(torch.equal(value, again.state()[name]) for name, value in weights.state().items())


def test_muon_takes_linear_weights_in_transformer_blocks_and_no_table_of_vectors() -> None:
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList([BasicTransformerBlock(8, 2, 4, cross_attention_dim=8, norm_type="ada_norm_single")])
    network.down_blocks = nn.ModuleList([ResnetBlock2D(in_channels=8, temb_channels=8, groups=4)])
    weights = MasterWeights(network, muon=True)
    names = {weights.names[i].removeprefix("transformer_blocks.0.") for part, _ in weights.muons for i in part}
    linear = [f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    assert names == {f"{layer}.weight" for layer in (*linear, "ff.net.0.proj", "ff.net.2")}


def test_muon_steps_the_inner_convolutions_of_a_network_of_convolutions_as_matrices() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 4, 3))
    before = network[1].weight.detach().clone()
    weights = MasterWeights(network, muon=True)
    assert [weights.names[i] for part, _ in weights.muons for i in part] == ["1.weight"]
    network(torch.randn(2, 3, 9, 9)).square().mean().backward()
    weights.step(0.1)
    moved = (network[1].weight.detach() - before).flatten(1)
    values = torch.linalg.svdvals(moved)
    assert values.max() / values.min() < 2  # all directions move about as far, which those of a gradient do not
    assert weights.state()["momentum.1.weight"].shape == before.shape


def test_a_moving_average_is_refused_by_another_network() -> None:
    weights = MasterWeights(nn.Sequential(nn.Linear(2, 2)))
    assert torch.equal(weights.averaged(nn.Sequential(nn.Linear(2, 2)))[0].weight, weights.averages[0])
    with pytest.raises(ValueError, match=r"Linear has no 0\.weight, 0\.bias"):
        weights.averaged(nn.Linear(2, 2))


@pytest.mark.parametrize("grouped", [True, False])
def test_a_checkpoint_with_a_former_name_of_a_setting_resumes(tmp_path: Path, grouped: bool) -> None:
    recipe = StudentRecipe(negative_scale_max=0.5)
    stage = Stage("student", tmp_path, recipe, {"clip": "abc"}, former_names=FORMER_NAMES)
    before = {**flattened(recipe), **stage.inputs, "nasa_max": 0.5}
    del before["negative_scale_max"]
    if not grouped:
        before = {name: value for name, value in before.items() if "." not in name and name != "clip"} | {"vsd_weight": 1.0}
        stage = replace(stage, inputs={})
    (tmp_path / "checkpoints").mkdir()
    metadata = {"step": "1", "recipe": json.dumps(before)}
    save_file({"a": torch.zeros(1)}, tmp_path / "checkpoints" / "0000001.safetensors", metadata)
    assert loop.first_step(stage) == 1
    with pytest.raises(InputError, match=r"\(negative_scale_max 0.5 -> 1.0\)"):
        loop.first_step(replace(stage, recipe=replace(recipe, negative_scale_max=1.0)))
