"""Times whole one-step students on a GPU, with and without a negative prompt: diffusers, torch.compile, ours, and exported graphs.

    python tools/gpu_students.py --out docs/gpu/students.json

True architectures with random weights and TAESD, 512 x 512, fp16. `diffusers`: its own network with NASA as two attentions. `compile`:
the same through torch.compile with CUDA graphs. `ours`: the folded network with our kernel, in one CUDA graph. `cuda`, `tensorrt`: the
exported graph in our engines, where their packages are. A training step is that of the student alone (forward and backward, bf16).
With --tiny, on a CPU too, it only shows that it runs.
"""

import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny_students
from random_student import UNETS

from snoopi_rt.engines import check_engine, load_engine
from snoopi_rt.engines.base import Axis, EngineError
from snoopi_rt.export.attention import GuidedAttention
from snoopi_rt.export.backbones import find_backbone
from snoopi_rt.export.backbones.pixart import FoldedPixArt, GuidedPixArt
from snoopi_rt.export.backbones.unet import FoldedUNet, GuidedUNet
from snoopi_rt.export.decoder import Decoder
from snoopi_rt.export.graphs.half import half_arithmetic
from snoopi_rt.export.graphs.write import write_graph
from snoopi_rt.export.guidance import Guidance, find_guidance
from snoopi_rt.export.presets.rows import default_preset
from snoopi_rt.kernels import fused_attention

Run = Callable[[], object]
TOKENS = {"pixart": 20, "sd15": 77, "sd21": 77}
RUNS = 20


@dataclass(frozen=True)
class Case:
    """One student's inputs on one device. A negative of None is the student without one."""

    kind: str
    noise: Tensor
    states: Tensor
    negative: tuple[Tensor, Tensor] | None

    @property
    def arguments(self) -> dict[str, Tensor]:
        """As the generator's modules take them."""
        given = {"noise": self.noise, "prompt_states": self.states}
        return given if self.negative is None else {**given, "negative_states": self.negative[0], "negative_scale": self.negative[1]}


@click.command()
@click.option("--student", "kinds", multiple=True, default=("pixart", "sd21", "sd15"))
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 4, 8))
@click.option("--seconds", "limit", default=240.0, help="No further student is begun after so long.")
@click.option("--exported/--not-exported", default=True, help="Also write graphs and run them in our engines.")
@click.option("--tiny", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(kinds: tuple[str, ...], batches: tuple[int, ...], limit: float, exported: bool, tiny: bool, out: Path) -> None:
    """Print the table and write it as JSON, line by line as it is measured."""
    gpu = torch.cuda.is_available()
    if not gpu and not tiny:
        raise click.ClickException("no GPU that torch can use: nothing to time (--tiny shows that it runs)")
    device = torch.device("cuda" if gpu else "cpu")
    document: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__, "rows": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    click.echo(f"{'student':8}{'batch':>6}{'way':>10}{'no negative ms':>16}{'negative ms':>13}{'costs':>8}{'GB':>7}")
    begun = time.perf_counter()

    def tell(row: dict[str, Any]) -> None:
        document["rows"].append(row)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if "why not" in row:
            click.echo(f"{row['student']:8}{row['batch']:6}{row['way']:>10}  {row['why not']}")
            return
        plain, guided = row["plain"] * 1e3, row["negative"] * 1e3
        click.echo(
            f"{row['student']:8}{row['batch']:6}{row['way']:>10}{plain:16.2f}{guided:13.2f}{guided / plain - 1:8.1%}{row['GB']:7.1f}"
        )

    for kind in kinds:
        if time.perf_counter() - begun > limit:
            click.echo(f"{kind}: not measured, time is over")
            continue
        with torch.device(device):
            network, decoder = student(kind, tiny), Decoder(tiny_vae()).eval().requires_grad_(False)
            for batch in batches:
                cases = [case(kind, network, batch, guided, tiny) for guided in (False, True)]
                for name, way in ways(kind, network, gpu).items():
                    tell(measured(name, cases, decoder.half() if gpu else decoder, way))
                tell(training(kind, network, cases[1]))
            if exported:
                for engine in ("cuda", "tensorrt"):
                    for row in exported_rows(kind, network, decoder, engine, batches, tiny):
                        tell(row)


def student(kind: str, tiny: bool) -> nn.Module:
    """The network with random weights, fp32."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    torch.manual_seed(0)
    if tiny:
        network = tiny_students.pixart_network() if kind == "pixart" else tiny_students.unet(kind, 1, mid_block_type=None)
    elif kind == "pixart":
        network = PixArtTransformer2DModel(sample_size=64, caption_channels=4096, use_additional_conditions=False)
        nn.init.normal_(network.proj_out.weight, std=0.02)
    else:
        network = UNet2DConditionModel(**UNETS[kind])
    return network.eval().requires_grad_(False)


def tiny_vae() -> nn.Module:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny()


def case(kind: str, network: nn.Module, batch: int, guided: bool, tiny: bool) -> Case:
    """Random inputs, of the type that the networks compute in; PixArt's states are those before its caption projection."""
    side, dtype = network.config.sample_size if tiny else 64, torch.float16 if torch.cuda.is_available() else torch.float32
    width = network.config.caption_channels if kind == "pixart" else network.config.cross_attention_dim
    states = torch.randn(batch, TOKENS[kind], width, dtype=dtype)
    negative = (torch.randn(batch, TOKENS[kind], width, dtype=dtype), torch.full((batch,), 0.5, dtype=dtype))
    return Case(kind, torch.randn(batch, 4, side, side, dtype=dtype), states, negative if guided else None)


def ways(kind: str, network: nn.Module, gpu: bool) -> dict[str, Callable[[Case], Callable[..., Tensor]]]:
    """By name, what makes the generator of a case."""
    rule, empty = default_preset(kind).rule, torch.empty(0)
    guided = (lambda *given: GuidedPixArt(*given, size=size(network))) if kind == "pixart" else GuidedUNet

    def diffusers(_: Case) -> nn.Module:
        module = guided(half(network), rule, find_guidance("nasa"), empty)
        module.network.set_attn_processor(GuidedAttention(find_guidance("nasa"), empty, fused_attention))
        return module

    def compiled(each: Case) -> Callable[..., Tensor]:
        return torch.compile(diffusers(each), mode="reduce-overhead", dynamic=False)

    def ours(each: Case) -> Callable[..., Tensor]:
        module = folded(kind, network, nasa(gpu) if each.negative is not None else find_guidance("none"))
        return one_graph(half(module), each) if gpu else module

    return {"diffusers": diffusers, **({"compile": compiled} if gpu else {}), "ours": ours}


def size(network: nn.Module) -> tuple[int, int]:
    return network.config.sample_size * 8, network.config.sample_size * 8


def half(module: nn.Module) -> nn.Module:
    """In the type that is timed, beside the fp32 module that it is made of."""
    return copy.deepcopy(module).half() if torch.cuda.is_available() else module


def nasa(kernel: bool) -> Guidance:
    """NASA, through our kernel on a GPU."""
    guidance = find_guidance("nasa")
    if not kernel:
        return guidance
    from snoopi_rt.kernels.nasa import fused_nasa_attention

    return replace(guidance, attend=lambda *given, attention: fused_nasa_attention(*given))


def folded(kind: str, network: nn.Module, guidance: Guidance) -> nn.Module:
    """The network that we export; its PixArt takes states behind the caption projection, which is put before it here."""
    rule, empty = default_preset(kind).rule, torch.empty(0)
    if kind != "pixart":
        return FoldedUNet(network, rule, guidance, empty).eval()
    return Projected(
        network.caption_projection, FoldedPixArt(network, rule, guidance, empty, size(network), cross_attention=fused_attention)
    )


class Projected(nn.Module):
    """A folded PixArt with its caption projection, for a fair comparison: it takes what diffusers' network takes."""

    def __init__(self, projection: nn.Module, network: nn.Module):
        super().__init__()
        self.projection, self.network = projection, network

    def forward(self, noise: Tensor, prompt_states: Tensor, **negative: Tensor) -> Tensor:
        if negative:
            negative["negative_states"] = self.projection(negative["negative_states"])
        return self.network(noise, self.projection(prompt_states), **negative)


def one_graph(module: nn.Module, each: Case) -> Callable[..., Tensor]:
    """The module's call for the shapes of a case as one CUDA graph."""
    for _ in range(3):
        module(**each.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = module(**each.arguments)

    def run(**_: Tensor) -> Tensor:
        graph.replay()
        return output

    return run


@torch.no_grad()
def measured(name: str, cases: list[Case], decoder: nn.Module, way: Callable[[Case], Callable[..., Tensor]]) -> dict[str, Any]:
    """Median seconds of generator and decoder without and with a negative, in turns, and the most memory that torch held."""
    row = {"student": cases[0].kind, "batch": len(cases[0].noise), "way": name}
    try:
        with peak() as gigabytes:
            runs = []
            for each in cases:
                generator = way(each)
                runs.append(lambda generator=generator, each=each: decoder(generator(**each.arguments).to(each.noise.dtype)))
            plain, negative = interleaved(runs)
        return {**row, "plain": plain, "negative": negative, "GB": gigabytes[0]}
    except Exception as error:  # one way that fails must not cost the others their figures
        return {**row, "why not": next(iter(str(error).splitlines()), type(error).__name__)}


def training(kind: str, network: nn.Module, each: Case) -> dict[str, Any]:
    """Median seconds of a student's forward and backward with NASA inside, with two attentions (`plain`) and with our kernel."""
    dtype = torch.bfloat16 if each.noise.is_cuda else torch.float32
    answer, runs = find_backbone(kind).denoiser().answer, []
    row = {"student": kind, "batch": len(each.noise), "way": "training"}
    assert each.negative is not None
    states, negative, scale = each.states.to(dtype), each.negative[0].to(dtype), each.negative[1].to(dtype)
    timestep = torch.full((len(each.noise),), 999)
    try:
        with peak() as gigabytes:
            for attend in (None, nasa(True).attend if each.noise.is_cuda else None):
                trained = copy.deepcopy(network).to(dtype).requires_grad_(True)
                kernel = None if attend is None else (lambda *given, attend=attend: attend(*given, attention=None))
                trained.set_attn_processor(GuidedAttention(find_guidance("nasa"), torch.empty(0), fused_attention, kernel))

                def step(trained: nn.Module = trained) -> None:
                    answer(
                        trained, each.noise.to(dtype), timestep, states, None, (negative, None, scale)
                    ).float().square().mean().backward()
                    trained.zero_grad()

                runs.append(step)
            plain, kernel_seconds = interleaved(runs)
        return {**row, "plain": plain, "negative": kernel_seconds, "GB": gigabytes[0], "what": "two attentions, and our kernel"}
    except Exception as error:
        return {**row, "why not": next(iter(str(error).splitlines()), type(error).__name__)}


def exported_rows(
    kind: str, network: nn.Module, decoder: nn.Module, engine: str, batches: tuple[int, ...], tiny: bool
) -> Iterator[dict[str, Any]]:
    """The exported graph in one of our engines, one image after the other through host memory as the runtime hands it over."""
    dtype, tokens = torch.float32, TOKENS[kind]
    axes = {name: Axis(1, tokens, tokens) for name in ("tokens", "negative_tokens")} | {"batch": Axis(1, 1, max(batches))}
    with tempfile.TemporaryDirectory() as folder, torch.device("cpu"):
        path, begun = Path(folder), time.perf_counter()
        try:
            check_engine(engine)
            cpu, pictures = network.cpu(), decoder.cpu().float()
            example = {name: value.cpu().to(dtype) for name, value in case(kind, cpu, 2, True, tiny).arguments.items()}
            generator = folded(kind, cpu, find_guidance("nasa"))
            if isinstance(generator, Projected):  # the projection belongs to the text encoder's graph
                for name in ("prompt_states", "negative_states"):
                    example[name] = generator.projection(example[name])
                generator = generator.network
            dynamic = {name: {0: "batch"} for name in example} | {
                "prompt_states": {0: "batch", 1: "tokens"},
                "negative_states": {0: "batch", 1: "negative_tokens"},
            }
            opened = {}
            graphs = {
                "generator": (generator, example, "latent", dynamic),
                "decoder": (pictures, {"latent": example["noise"]}, "image", {"latent": {0: "batch"}}),
            }
            for name, (module, inputs, output, free) in graphs.items():
                write_graph(module, inputs, (output,), free, path / f"{name}.onnx", "fp16")
                half_arithmetic(path / f"{name}.onnx", path / f"{name}-gpu.onnx")
                opened[name] = load_engine(engine, path / f"{name}-gpu.onnx", "fp16", axes=axes)
        except Exception as error:
            yield {"student": kind, "batch": 1, "way": engine, "why not": next(iter(str(error).splitlines()), type(error).__name__)}
            return
        built = time.perf_counter() - begun
        for batch in batches:
            runs = []
            for used in (1, tokens):
                given = {name: value[:1].expand(batch, *value.shape[1:]).contiguous().numpy() for name, value in example.items()}
                given["negative_states"] = given["negative_states"][:, :used]

                def run(given: dict[str, Any] = given) -> None:
                    latent = opened["generator"](**given)["latent"]
                    opened["decoder"](latent=latent)["image"].__array__()

                runs.append(run)
            plain, negative = interleaved(runs)
            yield {"student": kind, "batch": batch, "way": engine, "plain": plain, "negative": negative, "GB": 0.0, "built": built}
        for each in opened.values():
            with suppress(EngineError):
                each.close()


def interleaved(runs: list[Run]) -> list[float]:
    """Median seconds of each, called in turns after three calls of each."""
    taken: list[list[float]] = [[] for _ in runs]
    for turn in range(3 + (RUNS if torch.cuda.is_available() else 1)):
        for place, run in enumerate(runs):
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            if turn >= 3:
                taken[place].append(time.perf_counter() - start)
    return [statistics.median(each) for each in taken]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak() -> Iterator[list[float]]:
    """The most gigabytes that torch held meanwhile, in the list when the block ends."""
    found: list[float] = []
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0)


if __name__ == "__main__":
    main()
