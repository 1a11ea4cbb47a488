"""Times whole one-step students on a GPU, with and without a negative prompt: diffusers, ours with the NASA kernel, torch.compile.

    python tools/gpu_students.py --student pixart --out docs/gpu/pixart.json

True architectures with random weights and TAESD, 512 x 512, fp16. `diffusers`: its own network with NASA as two attentions. `ours`: the
folded network with our kernel, in one CUDA graph. `compiled`: diffusers' through torch.compile with CUDA graphs. `apart` is how far the
clean latent with a negative lies from diffusers', of its own size: fp16 in another order, and nothing more.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import gpu_timing
import torch
from diffusers import AutoencoderTiny, PixArtTransformer2DModel, UNet2DConditionModel
from gpu_timing import apart, gpu_name, interleaved, peak, recorded
from random_student import UNETS
from torch import Tensor, nn

from snoopi_rt.engines.messages import why
from snoopi_rt.export.attention import GuidedAttention
from snoopi_rt.export.backbones.pixart import FoldedPixArt, GuidedPixArt
from snoopi_rt.export.backbones.unet import FoldedUNet, GuidedUNet
from snoopi_rt.export.decoder import Decoder
from snoopi_rt.export.guidance import Guidance, find_guidance
from snoopi_rt.export.presets.choose import default_preset
from snoopi_rt.kernels import fused_attention
from snoopi_rt.kernels.nasa import fused_nasa_attention

Generator = Callable[..., Tensor]
TOKENS = {"pixart": 20, "sd15": 77, "sd21": 77}
TIMES = 20
"""How often each is timed."""


@dataclass(frozen=True)
class Case:
    """One student's inputs. A negative of None is the student without one."""

    kind: str
    noise: Tensor
    states: Tensor
    negative: tuple[Tensor, Tensor] | None

    @property
    def arguments(self) -> dict[str, Tensor]:
        """As the generator's modules take them."""
        prompt = {"noise": self.noise, "prompt_states": self.states}
        return prompt if self.negative is None else {**prompt, "negative_states": self.negative[0], "negative_scale": self.negative[1]}


def pixart() -> nn.Module:
    network = PixArtTransformer2DModel(sample_size=64, caption_channels=4096, use_additional_conditions=False)
    nn.init.normal_(network.proj_out.weight, std=0.02)
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "pixart": pixart,
    "sd15": lambda: UNet2DConditionModel(**UNETS["sd15"]),
    "sd21": lambda: UNet2DConditionModel(**UNETS["sd21"]),
}


@click.command()
@click.option("--student", "kinds", type=click.Choice(list(NETWORKS)), multiple=True, default=tuple(NETWORKS))
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 4, 8))
@click.option("--compiled", is_flag=True, help="Also torch.compile: a minute for each student, batch and half of the table.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(kinds: tuple[str, ...], batches: tuple[int, ...], compiled: bool, out: Path) -> None:
    """Print the table and write it as JSON, line by line as it is measured."""
    document: dict[str, Any] = {"gpu": gpu_name(), "torch": torch.__version__, "rows": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    click.echo(f"{'student':8}{'batch':>6}{'way':>10}{'no negative ms':>16}{'negative ms':>13}{'costs':>8}{'GB':>7}{'apart':>9}")
    with gpu_timing.DEVICE, torch.no_grad():
        for kind in kinds:
            network, decoder = student(kind), Decoder(AutoencoderTiny()).eval().requires_grad_(False).half()
            for batch in batches:
                cases = [case(kind, network, batch, guided) for guided in (False, True)]
                expected = None
                for name, way in ways(kind, network, compiled).items():
                    row, latent = measured(name, cases, decoder, way)
                    if name == "diffusers":
                        expected = latent
                    elif latent is not None and expected is not None:
                        row["apart"] = apart(latent, expected)
                    document["rows"].append(row)
                    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                    click.echo(line(row))


def student(kind: str) -> nn.Module:
    """The network with random weights, fp32."""
    torch.manual_seed(0)
    return NETWORKS[kind]().eval().requires_grad_(False)


def case(kind: str, network: nn.Module, batch: int, guided: bool, dtype: torch.dtype = torch.float16) -> Case:
    """Random inputs; PixArt's states are those before its caption projection."""
    side = network.config.sample_size
    width = network.config.caption_channels if kind == "pixart" else network.config.cross_attention_dim
    states = torch.randn(batch, TOKENS[kind], width, dtype=dtype)
    negative = (torch.randn(batch, TOKENS[kind], width, dtype=dtype), torch.full((batch,), 0.5, dtype=dtype))
    return Case(kind, torch.randn(batch, 4, side, side, dtype=dtype), states, negative if guided else None)


def ways(kind: str, network: nn.Module, compiled: bool) -> dict[str, Callable[[Case], Generator]]:
    """What makes the generator of a case, by name."""
    by_diffusers = partial(diffusers, kind, network)
    ways: dict[str, Callable[[Case], Generator]] = {"diffusers": by_diffusers, "ours": partial(ours, kind, network)}
    if compiled:
        ways["compiled"] = lambda case: torch.compile(by_diffusers(case), mode="reduce-overhead", dynamic=False)
    return ways


def diffusers(kind: str, network: nn.Module, case: Case) -> Generator:
    """diffusers' own network, with NASA as two of torch's attentions."""
    rule, empty, guidance = default_preset(kind).rule, torch.empty(0), find_guidance("nasa")
    half = copy.deepcopy(network).half()
    module = GuidedPixArt(half, rule, guidance, empty, size(network)) if kind == "pixart" else GuidedUNet(half, rule, guidance, empty)
    half.set_attn_processor(GuidedAttention(guidance, empty, fused_attention))
    return module


def ours(kind: str, network: nn.Module, case: Case) -> Generator:
    """The folded network with our kernel as one CUDA graph, for the shapes of the case."""
    guidance = find_guidance("none") if case.negative is None else ThroughTheKernel(**vars(find_guidance("nasa")))
    module = copy.deepcopy(folded(kind, network, guidance)).half()
    replay = recorded(lambda: module(**case.arguments))
    return lambda **_: replay()


class ThroughTheKernel(Guidance):
    """NASA, computed by our kernel."""

    @property
    def attend(self) -> Generator:
        return lambda *inputs, attention: fused_nasa_attention(*inputs)


def folded(kind: str, network: nn.Module, guidance: Guidance) -> nn.Module:
    """The network that we export; its PixArt takes states behind the caption projection, which is put before it here."""
    rule, empty = default_preset(kind).rule, torch.empty(0)
    if kind != "pixart":
        return FoldedUNet(network, rule, guidance, empty).eval()
    return Projected(
        network.caption_projection, FoldedPixArt(network, rule, guidance, empty, size(network), cross_attention=fused_attention)
    )


def size(network: nn.Module) -> tuple[int, int]:
    return network.config.sample_size * 8, network.config.sample_size * 8


class Projected(nn.Module):
    """A folded PixArt with its caption projection, for a fair comparison: it takes what diffusers' network takes."""

    def __init__(self, projection: nn.Module, network: nn.Module):
        super().__init__()
        self.projection, self.network = projection, network

    def forward(self, noise: Tensor, prompt_states: Tensor, **negative: Tensor) -> Tensor:
        if negative:
            negative["negative_states"] = self.projection(negative["negative_states"])
        return self.network(noise, self.projection(prompt_states), **negative)


def measured(name: str, cases: list[Case], decoder: nn.Module, way: Callable[[Case], Generator]) -> tuple[dict[str, Any], Tensor | None]:
    """Median seconds of generator and decoder without and with a negative, in turns, and the most memory that torch held; and the latent.

    A lack of memory is a row that says so, and no latent.
    """
    row = {"student": cases[0].kind, "batch": len(cases[0].noise), "way": name}
    try:
        with peak() as gigabytes:
            plain, guided = (way(case) for case in cases)
            latent = guided(**cases[1].arguments).clone()  # the next call may write where this one has written
            seconds = interleaved(
                {
                    "plain": lambda: decoder(plain(**cases[0].arguments).half()),
                    "negative": lambda: decoder(guided(**cases[1].arguments).half()),
                },
                TIMES,
            )
    except torch.OutOfMemoryError as error:
        return {**row, "why not": why(error)}, None
    return {**row, **seconds, "GB": gigabytes[0]}, latent


def line(row: dict[str, Any]) -> str:
    """The row for people."""
    name = f"{row['student']:8}{row['batch']:6}{row['way']:>10}"
    if "why not" in row:
        return f"{name}  {row['why not']}"
    plain, negative = row["plain"] * 1e3, row["negative"] * 1e3
    difference = f"{row['apart']:9.1e}" if "apart" in row else ""
    return f"{name}{plain:16.2f}{negative:13.2f}{negative / plain - 1:8.1%}{row['GB']:7.1f}{difference}"


if __name__ == "__main__":
    main()
