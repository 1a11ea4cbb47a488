"""tools/joint_negatives.py: its student draws with every kind of guidance, and its training takes steps of the loss it names."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import joint_negatives
    import joint_networks

    return joint_negatives, joint_networks


@pytest.fixture
def network(tools: tuple[ModuleType, ModuleType]) -> torch.nn.Module:
    torch.manual_seed(0)
    network = tools[1].joint_transformer()
    torch.nn.init.normal_(network.proj_out.weight, std=0.05)
    return network.bfloat16()


def test_every_kind_acts_on_the_students_one_step_and_leaves_it_as_it_was(
    tools: tuple[ModuleType, ModuleType], network: torch.nn.Module
) -> None:
    negatives, networks = tools
    noise = torch.randn(2, *networks.SHAPE, generator=torch.Generator().manual_seed(0))
    text, other = networks.Text.encode(["a cat", "a dog"]), networks.Text.encode(["blurry", "a horse"])
    with torch.no_grad():
        plain = networks.in_one_step(network, noise, text)
    measured = negatives.Negatives(network, None)

    def latents(negative: object, kind: str, scale: float) -> Tensor:
        return measured.latents(noise, text, negative, kind, scale)

    assert torch.equal(latents(None, "nasa", 1.0), plain)
    guided = [latents(other, kind, max(scales)) for kind, scales in negatives.SCALES.items()]
    assert all((one - plain).abs().mean() > 0.004 for one in guided)
    assert all((one - two).abs().mean() > 0.004 for i, one in enumerate(guided) for two in guided[:i])
    assert torch.equal(latents(None, "nasa", 1.0), plain)


def test_the_loss_is_zero_for_the_networks_own_prediction(tools: tuple[ModuleType, ModuleType], network: torch.nn.Module) -> None:
    networks = tools[1]
    noise, text = torch.randn(2, *networks.SHAPE, generator=torch.Generator().manual_seed(0)), networks.Text.encode(["a cat", "a dog"])
    t = torch.full((2,), networks.LAST)
    with torch.no_grad():
        target = -networks.in_one_step(network, noise, text)
        arguments = network, noise, t, text.states, text.pooled
        assert networks.loss(*arguments, target) == 0 and networks.loss(*arguments, target + 1) == pytest.approx(1, abs=1e-3)
