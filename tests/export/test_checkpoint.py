"""Weights from disk: what diffusers and transformers load, and a refusal of everything that does not fit exactly."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from snoopi_rt.errors import InputError
from snoopi_rt.export.weights.checkpoint import load_module

UNET = "diffusion_pytorch_model.safetensors"


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def tiny_pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, sample_size=8, caption_channels=8
    )


def tiny_clip(kind: type = CLIPTextModel) -> torch.nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": 8}
    return kind(CLIPTextConfig(vocab_size=50, max_position_embeddings=9, bos_token_id=48, eos_token_id=49, **sizes))


def tiny_t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50))


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


TINY = {
    UNet2DConditionModel: tiny_unet,
    PixArtTransformer2DModel: tiny_pixart,
    AutoencoderKL: tiny_vae,
    CLIPTextModel: tiny_clip,
    CLIPTextModelWithProjection: lambda: tiny_clip(CLIPTextModelWithProjection),
    T5EncoderModel: tiny_t5,
}


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    tiny_unet().save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def everything(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, those too that no file holds."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def assert_equal(module: torch.nn.Module, expected: torch.nn.Module) -> None:
    tensors, expected_tensors = everything(module), everything(expected)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("kind", TINY, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_loads_as_from_pretrained_with_every_buffer(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    TINY[kind]().save_pretrained(tmp_path)
    module = load_module(tmp_path, kind, dtype=dtype)
    assert_equal(module, kind.from_pretrained(tmp_path, torch_dtype=dtype))
    assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("kind", [UNet2DConditionModel, T5EncoderModel], ids=lambda kind: kind.__name__)
def test_sharded_and_half_precision_weights_load_as_from_pretrained(kind: Any, tmp_path: Path) -> None:
    model = TINY[kind]()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*-of-*"))) > 1
    assert_equal(load_module(tmp_path / "sharded", kind), model)
    model.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert_equal(load_module(tmp_path / "half", kind), kind.from_pretrained(tmp_path / "half", variant="fp16", torch_dtype=torch.float32))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("*-of-*"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks {shard.name}"):
        load_module(tmp_path, UNet2DConditionModel)


def mapped_from(tensor: torch.Tensor) -> str:
    """The file whose mapping holds the tensor's data; empty for memory of the process's own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line[line.index("/") :] if "/" in line else ""
    raise AssertionError("a tensor outside all mappings")


@pytest.mark.parametrize("kind", [UNet2DConditionModel, T5EncoderModel], ids=lambda kind: kind.__name__)
def test_weights_in_the_wanted_precision_stay_in_the_file(kind: type, tmp_path: Path) -> None:
    model = TINY[kind]()
    model.bfloat16().save_pretrained(tmp_path / "half")
    torch.save(model.state_dict(), tmp_path / "half.bin")
    (file,) = (tmp_path / "half").glob("*.safetensors")
    for parameter in load_module(tmp_path / "half", kind, dtype=torch.bfloat16).parameters():
        assert mapped_from(parameter) == str(file)
    for parameter in load_module(tmp_path / "half", kind, tmp_path / "half.bin", dtype=torch.bfloat16).parameters():
        assert mapped_from(parameter) == str(tmp_path / "half.bin")
    for parameter in load_module(tmp_path / "half", kind).parameters():
        assert mapped_from(parameter) == "" and parameter.dtype == torch.float32


def test_a_conversion_holds_one_copy(tmp_path: Path) -> None:
    def private() -> int:
        return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024

    model = T5EncoderModel(T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=8000)).half()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    before = private()
    assert load_module(tmp_path, T5EncoderModel).dtype == torch.float32
    assert private() - before < 1.2 * size


def test_former_names_of_diffusers_and_transformers_are_read(tmp_path: Path) -> None:
    """SD 1.5's VAE calls its attention `query`, its text encoder holds positions, PixArt's folders name another class."""
    vae, clip, pixart = tiny_vae(), tiny_clip(), tiny_pixart()
    vae.save_pretrained(tmp_path / "vae")
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {re.sub("to_(q|k|v|out.0)", lambda match: former[match[0]], name): value for name, value in vae.state_dict().items()}
    assert any(".query." in name for name in state)
    save_file(state, tmp_path / "vae" / UNET)
    assert_equal(load_module(tmp_path / "vae", AutoencoderKL), vae)

    clip.save_pretrained(tmp_path / "clip")
    state = {f"text_model.{name}": value for name, value in load_file(tmp_path / "clip" / "model.safetensors").items()}
    torch.save(state | {"text_model.embeddings.position_ids": torch.arange(9)[None]}, tmp_path / "clip" / "pytorch_model.bin")
    (tmp_path / "clip" / "model.safetensors").unlink()
    assert_equal(load_module(tmp_path / "clip", CLIPTextModel), clip)

    pixart.save_pretrained(tmp_path / "pixart")
    config = tmp_path / "pixart" / "config.json"
    config.write_text(config.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    save_file(pixart.state_dict() | {"caption_projection.y_embedding": torch.zeros(4, 8)}, tmp_path / "pixart" / UNET)
    assert_equal(load_module(tmp_path / "pixart", PixArtTransformer2DModel), pixart)


@pytest.mark.parametrize("kind", [UNet2DConditionModel, CLIPTextModel], ids=lambda kind: kind.__name__)
def test_missing_unexpected_and_reshaped_keys_are_listed_in_one_line(kind: type, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    TINY[kind]().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = load_file(file)
    *lost, changed = sorted(name for name in state if name.endswith("weight"))[-8:]
    for name in lost:
        del state[name]
    state[changed] = torch.zeros(3, 5)
    save_file(state | {"strange": torch.zeros(1)}, file)
    capfd.readouterr()
    with pytest.raises(InputError) as raised:
        load_module(tmp_path, kind)
    line = str(raised.value)
    assert f"keys missing: 7 ({', '.join(lost[:5])}, ...); unexpected: 1 (strange); of another shape: 1 ({changed} (3, 5) not (" in line
    assert "\n" not in line
    assert "strange" not in capfd.readouterr().err


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


UNUSED = {"caption_projection.y_embedding": torch.ones(2)}
WRAPPINGS = {
    "plain.safetensors": lambda state: state,
    "plain.bin": lambda state: state,
    "prefixed.safetensors": lambda state: prefixed(state, "transformer."),
    "module.pth": lambda state: prefixed(state, "module."),
    "training.pt": lambda state: {"state_dict": state, "step": 7},
    "ema.bin": lambda state: {"ema": dict(state)},
    "both.bin": lambda state: {"state_dict": prefixed(state, "model.diffusion_model.")},
    "unused.bin": lambda state: prefixed(state | UNUSED, "transformer."),
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_a_single_file_replaces_the_weights_of_the_base_folder(name: str, tmp_path: Path) -> None:
    base, student = tiny_pixart(), tiny_pixart()
    base.save_pretrained(tmp_path / "transformer")
    (save_file if name.endswith(".safetensors") else torch.save)(WRAPPINGS[name](student.state_dict()), tmp_path / name)
    assert_equal(load_module(tmp_path / "transformer", PixArtTransformer2DModel, tmp_path / name), student)


def test_a_folder_of_weights_replaces_those_of_the_base_folder(unet: Path, tmp_path: Path) -> None:
    student = tiny_unet()
    student.save_pretrained(tmp_path / "unet_ema")
    assert_equal(load_module(unet, UNet2DConditionModel, tmp_path / "unet_ema"), student)
    (tmp_path / "unet_ema" / "config.json").unlink()
    assert_equal(load_module(unet, UNet2DConditionModel, tmp_path / "unet_ema"), student)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda state: {"model": state, "ema": dict(state)}, "2 networks that fit"),
        (lambda state: prefixed(state, "unet.") | {"vae.x": torch.zeros(1)}, "unexpected"),
        (lambda state: {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, "missing"),
        (lambda state: {"step": 3}, "missing"),
        (lambda state: list(state.values()), "holds a list"),
    ],
    ids=["two networks", "a whole pipeline", "original layout", "no tensors", "a list"],
)
def test_single_files_that_do_not_fit_strictly_are_refused(state, message: str, unet: Path, tmp_path: Path) -> None:
    torch.save(state(load_file(unet / UNET)), tmp_path / "student.bin")
    with pytest.raises(InputError, match=message):
        load_module(unet, UNet2DConditionModel, tmp_path / "student.bin")


class Malicious:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", [UNet2DConditionModel, CLIPTextModel], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["", "student.pt"], ids=["folder", "file"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(name: str, kind: type, tmp_path: Path) -> None:
    TINY[kind]().save_pretrained(tmp_path)
    (good,) = tmp_path.glob("*.safetensors")
    bad, mark = tmp_path / (name or {UNET: "diffusion_pytorch_model.bin"}.get(good.name, "pytorch_model.bin")), tmp_path / "ran"
    content = load_file(good) | {"bad": Malicious(mark)}
    good.unlink()
    for write in (lambda: torch.save(content, bad), lambda: bad.write_bytes(pickle.dumps(content))):
        write()
        with pytest.raises(InputError, match=r"not a plain state dict of torch .*convert it to safetensors"):
            load_module(tmp_path, kind, bad if name else None)
    assert not mark.exists()
    pickle.loads(bad.read_bytes())
    assert mark.exists(), "a file that does nothing when it is read would prove nothing"


def test_files_that_are_not_weights_are_one_clear_line(unet: Path, tmp_path: Path) -> None:
    for name, data, message in [
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer and not the file itself"),
        ("cut.safetensors", (unet / UNET).read_bytes()[:-10], "not a whole safetensors file"),
        ("empty.bin", b"", "empty.bin is empty"),
        ("network.ckpt", b"", "must end in"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            load_module(unet, UNet2DConditionModel, tmp_path / name)
    with pytest.raises(InputError, match="no weights file"):
        load_module(unet, UNet2DConditionModel, tmp_path / "absent.bin")


def test_folders_that_are_not_the_part_are_one_clear_line(unet: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a UNet2DConditionModel, not a PixArtTransformer2DModel"):
        load_module(unet, PixArtTransformer2DModel)
    with pytest.raises(InputError, match=r"no config.json in .*vae"):
        load_module(tmp_path / "vae", AutoencoderKL)
    tiny_t5().save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="holds a t5, not a clip_text_model"):
        load_module(tmp_path / "t5", CLIPTextModel)
    (unet / UNET).unlink()
    with pytest.raises(InputError, match="no weights in"):
        load_module(unet, UNet2DConditionModel)
    (unet / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is damaged or cut short, it is no JSON"):
        load_module(unet, UNet2DConditionModel)
