"""The small files beside weights: each that is missing, damaged or of another kind is one line with its name and what is wrong."""

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_students
import torch
from safetensors.torch import save_file

from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import Weights
from snoopi_rt.export.backbones.network import read_latent
from snoopi_rt.export.presets.scheduler import open_scheduler
from snoopi_rt.export.text.rule import clip_rule, t5_rule
from snoopi_rt.export.text.t5 import reference_states
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.lora import NETWORK, merge_loras

ROOT = Path(__file__).parent.parent
FOLDERS = ("snoopi_rt", "engines", "export", "kernels", "tools", "examples")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students of tiny weights, one in parts with an index, and a LoRA of peft."""
    from diffusers import UNet2DConditionModel

    root = tmp_path_factory.mktemp("small")
    tiny_students.stable_diffusion(root / "sd15", "sd15", levels=1, mid_block_type=None, tiny_vae=True)
    network = UNet2DConditionModel.from_pretrained(root / "sd15" / "unet")
    shutil.rmtree(root / "sd15" / "unet")
    network.save_pretrained(root / "sd15" / "unet", max_shard_size="20KB")
    tiny_students.pixart(root / "pixart", num_layers=1, tiny_vae=True)
    (root / "lora").mkdir()
    pair = {f"base_model.model.conv_in.lora_{half}.weight": torch.ones(1) for half in "AB"}
    save_file(pair, root / "lora" / "adapter_model.safetensors")
    (root / "lora" / "adapter_config.json").write_text('{"lora_alpha": 4}', encoding="utf-8")
    return root


@pytest.fixture
def students(originals: Path, tmp_path: Path) -> Path:
    """Copies that a test may damage."""
    return Path(shutil.copytree(originals, tmp_path / "students"))


def load_unet(root: Path) -> object:
    from diffusers import UNet2DConditionModel

    return load_module(root / "sd15" / "unet", UNet2DConditionModel)


def load_clip(root: Path) -> object:
    from transformers import CLIPTextModel

    return load_module(root / "sd15" / "text_encoder", CLIPTextModel)


def merge_lora(root: Path) -> object:
    return merge_loras([(root / "lora" / "adapter_model.safetensors", 1.0)], {NETWORK: torch.nn.Module()})


FILES: dict[str, Callable[[Path], object]] = {
    "sd15/unet/config.json": load_unet,
    "sd15/unet/diffusion_pytorch_model.safetensors.index.json": load_unet,
    "sd15/vae/config.json": lambda root: read_latent(Weights(root / "sd15"), "unet"),
    "sd15/text_encoder/config.json": load_clip,
    "sd15/tokenizer/vocab.json": lambda root: clip_rule(root / "sd15" / "tokenizer", root / "out.json", 10**6),
    "sd15/tokenizer/merges.txt": lambda root: clip_rule(root / "sd15" / "tokenizer", root / "out.json", 10**6),
    "sd15/tokenizer/tokenizer_config.json": lambda root: clip_rule(root / "sd15" / "tokenizer", root / "out.json", 10**6),
    "sd15/scheduler/scheduler_config.json": lambda root: open_scheduler(root / "sd15" / "scheduler" / "scheduler_config.json"),
    "pixart/tokenizer/tokenizer.json": lambda root: t5_rule(root / "pixart" / "tokenizer", root / "out.json", 120, 10**6),
    "pixart/text_encoder/config.json": lambda root: reference_states(root / "pixart" / "text_encoder", [torch.tensor([[1]])]),
    "lora/adapter_config.json": merge_lora,
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n"
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a git-lfs pointer": (lambda data: POINTER, "is a git-lfs pointer and not the file itself"),
    "nothing": (lambda data: b"", "is empty"),
    "half": (lambda data: data[: len(data) // 2], "cut short|no index"),
    "a list": (lambda data: b"[]", "holds a list and not a JSON object|no pair to merge"),
    "null": (lambda data: b"null", "holds null and not a JSON object|no pair to merge"),
    "Latin-1": (lambda data: data + b"\xe9", "not UTF-8 text"),
    "a page": (lambda data: b"<!doctype html><title>Not found</title>", "it is no JSON|no pair to merge"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_small_file_is_one_line_with_its_name(file: str, students: Path) -> None:
    path, whole = students / file, (students / file).read_bytes()
    if not file.startswith("lora"):
        FILES[file](students)  # undamaged, it is read
    for damage, (change, told) in DAMAGES.items():
        path.write_bytes(change(whole))
        with pytest.raises(InputError) as caught:
            FILES[file](students)
        message = str(caught.value)
        assert str(path) in message and re.search(told, message) and "\n" not in message, f"{damage}: {message}"
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=re.escape(str(path.parent))):
        FILES[file](students)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("sd15/unet/config.json", {"block_out_channels": 5}),
        ("sd15/unet/config.json", {"_class_name": []}),
        ("sd15/vae/config.json", {"decoder_block_out_channels": "wide"}),
        ("sd15/vae/config.json", {"scaling_factor": None}),
        ("sd15/vae/config.json", {"_class_name": ["AutoencoderKL"]}),
        ("sd15/text_encoder/config.json", {"num_attention_heads": 0}),
        ("sd15/text_encoder/config.json", {"hidden_size": "32"}),
        ("sd15/unet/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"conv_in.weight": 7}}),
        ("sd15/unet/diffusion_pytorch_model.safetensors.index.json", {"weight_map": []}),
        ("sd15/tokenizer/vocab.json", {"a": "0"}),
        ("sd15/scheduler/scheduler_config.json", {"num_train_timesteps": -1}),
        ("pixart/text_encoder/config.json", {"num_heads": "three"}),
        ("pixart/text_encoder/config.json", {"num_heads": 2**50}),
        ("sd15/text_encoder/config.json", {"vocab_size": 2**45}),
        ("sd15/unet/config.json", {"block_out_channels": [10**30]}),
        ("lora/adapter_config.json", {"alpha_pattern": 3}),
    ],
)
def test_a_value_that_cannot_be_is_one_line_too(file: str, change: dict, students: Path) -> None:
    path = students / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        FILES[file](students)
    assert "\n" not in str(caught.value)


def test_infinity_in_a_schedulers_file_is_read(students: Path) -> None:
    path = students / "sd15" / "scheduler" / "scheduler_config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | {"lambda_min_clipped": -float("inf")}), encoding="utf-8")
    assert open_scheduler(path).config.prediction_type == "epsilon"


def implicit(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls that read or write text in whichever encoding the locale has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(keyword.arg == "encoding" for keyword in node.keywords):
            name, keywords = ast.unparse(node.func).rpartition(".")[2], {keyword.arg for keyword in node.keywords}
            modes = [value.value for value in (*node.args, *(k.value for k in node.keywords)) if isinstance(value, ast.Constant)]
            binary = any(isinstance(mode, str) and re.fullmatch("[rwxa+]*b[rwxa+]*", mode) for mode in modes)
            if (
                (name == "read_text" and not node.args)
                or (name == "write_text" and len(node.args) < 2)
                or (ast.unparse(node.func) in ("open", "os.fdopen", "io.open") and not binary)
                or (name in ("run", "Popen", "check_output") and keywords & {"text", "universal_newlines"})
            ):
                yield node


def test_all_text_is_read_and_written_in_an_encoding_that_is_named() -> None:
    files = [ROOT / "setup.py", *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    found = [f"{file}:{call.lineno}" for file in files for call in implicit(ast.parse(file.read_text(encoding="utf-8")))]
    assert not found and len(files) > 100
