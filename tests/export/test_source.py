"""Folders and hub models: what is taken from each, and one line for each thing that can be wrong, against a real server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Hub, serving

from snoopi_rt.errors import InputError
from snoopi_rt.export.presets.choose import find_preset
from snoopi_rt.export.source import fetches
from snoopi_rt.export.weights.hub import WeightsFolder, find_weights, weight_files

# More than one chunk of the client: it resumes after the last complete one.
BIG = bytes(range(256)) * 44_000
LARGE = "unet/diffusion_pytorch_model.safetensors"

FILES = {
    "README.md": b"---\nlicense: openrail++\ntags:\n- text-to-image\n---\n# Tiny\n",
    "model_index.json": b"{}",
    "tiny.ckpt": b"all in one",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": BIG,
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"not averaged",
    "unet/diffusion_pytorch_model.bin": b"pickled",
    "unet/diffusion_flax_model.msgpack": b"flax",
    "unet/model.onnx": b"onnx",
    "unet/openvino_model.bin": b"openvino",
    "text_encoder/config.json": b"{}",
    "text_encoder/model-00001-of-00002.safetensors": b"first shard",
    "text_encoder/model-00002-of-00002.safetensors": b"second shard",
    "text_encoder/model.safetensors.index.json": b"{}",
    "text_encoder_2/config.json": b"{}",
    "text_encoder_2/model.safetensors": b"full precision",
    "text_encoder_2/model.fp16.safetensors": b"half precision",
    "text_encoder/pytorch_model.bin.index.json": b"{}",
    "text_encoder/pytorch_model-00001-of-00001.bin": b"pickled",
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"a b",
    "tokenizer_2/spiece.model": b"pieces",
    "scheduler/scheduler_config.json": b"{}",
    "safety_checker/model.safetensors": b"checker",
}
WANTED = {
    "README.md",
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "text_encoder_2/config.json",
    "text_encoder_2/model.fp16.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "scheduler/scheduler_config.json",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    # The client keeps equal contents once, so no two files are equal.
    files = {name: data if data in (BIG, FILES["README.md"]) else data + name.encode() for name, data in FILES.items()}
    with serving({"some/tiny": files}) as server:
        server.large = LARGE
        yield server


def run(cache: Path, endpoint: str, *arguments: object, prelude: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """find_weights in a process of its own, since huggingface_hub reads its environment once; prints its answer as JSON."""
    program = f"""
import json, sys
{prelude}
from snoopi_rt.errors import SnoopiError
from snoopi_rt.export.weights.hub import find_weights
try:
    source = find_weights(*{arguments!r})
    print(json.dumps(dict(vars(source), path=str(source.path))))
except SnoopiError as error:
    print(json.dumps(type(error).__name__ + ": " + str(error)))
assert "torch" not in sys.modules
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", program], env=clean | environment, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def fetch(cache: Path, endpoint: str, *arguments: object, **options: str) -> Any:
    """The fields of the source, or the error's line."""
    return json.loads(run(cache, endpoint, *arguments, **options).stdout)


def held(folder: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_hub_model_is_fetched_by_parts_and_found_again_without_network(hub: Hub, tmp_path: Path) -> None:
    done = run(tmp_path, hub.url, "some/tiny")
    fetched = json.loads(done.stdout)
    assert "100%" in done.stderr, "a progress bar"
    assert fetched == {"path": fetched["path"], "name": "some/tiny", "licence": "openrail++", "revision": COMMIT}
    assert held(fetched["path"]) == WANTED
    assert (Path(fetched["path"]) / "unet/diffusion_pytorch_model.safetensors").read_bytes() == BIG
    assert {name for _, name, _, _ in hub.sent} == WANTED and len(hub.sent) == len(WANTED)
    hub.shutdown()
    hub.server_close()
    assert fetch(tmp_path, hub.url, "some/tiny") == fetched
    assert fetch(tmp_path, hub.url, "some/tiny", ("unet",), HF_HUB_OFFLINE="1") == fetched
    # The bundle's provenance names the commit: with it the same weights are found again.
    assert fetch(tmp_path, hub.url, f"some/tiny@{COMMIT}", HF_HUB_OFFLINE="1") == fetched


@pytest.mark.parametrize("prelude", ["", "import huggingface_hub"])
def test_the_hub_is_not_told_what_is_installed_here_nor_who_runs_it(hub: Hub, tmp_path: Path, prelude: str) -> None:
    run(tmp_path, hub.url, "some/tiny", ("unet",), prelude=prelude, AI_AGENT="somebody")
    assert hub.asked and all(re.match("/(api/models/)?some/tiny/", path) for path, _ in hub.asked)
    assert not {agent for _, agent in hub.asked if "torch/" in agent or "agent/" in agent}


def test_a_file_goes_on_where_its_connection_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cut, hub.cuts = 11_000_000, 1
    fetched = fetch(tmp_path, hub.url, "some/tiny", ("unet",))
    first, second = (sent[1:] for sent in hub.sent if sent[1] == LARGE)
    assert first[1:] == (0, 11_000_000) and 0 < second[1] <= 11_000_000 and second[1] + second[2] == len(BIG)
    assert (Path(fetched["path"]) / "unet/diffusion_pytorch_model.safetensors").read_bytes() == BIG


def test_a_second_call_fetches_only_what_the_first_one_lacks(hub: Hub, tmp_path: Path) -> None:
    hub.broken = "unet/diffusion_pytorch_model.safetensors"
    assert "SnoopiError: hub model some/tiny cannot be fetched: " in (line := fetch(tmp_path, hub.url, "some/tiny"))
    assert "\n" not in line and "500" in line and line.endswith("run again to resume")
    whole = {name for _, name, _, _ in hub.sent}
    assert len(whole) > 2
    hub.broken, hub.sent = "", []
    fetched = fetch(tmp_path, hub.url, "some/tiny")
    assert held(fetched["path"]) == WANTED and {name for _, name, _, _ in hub.sent} == WANTED - whole


def test_root_parts_and_single_files_of_a_hub_model_are_parts_too(hub: Hub, tmp_path: Path) -> None:
    hub.models["some/tiny"] = {
        "config.json": b"{}",
        "diffusion_pytorch_model.safetensors": b"x",
        "model.onnx": b"x",
        "student.bin": b"x",
        "deep/a.bin": b"x",
    }
    fetched = fetch(tmp_path, hub.url, "some/tiny@v1", (".",))
    assert held(fetched["path"]) == {"config.json", "diffusion_pytorch_model.safetensors"} and fetched["licence"] is None
    fetched = fetch(tmp_path, hub.url, f"some/tiny@{COMMIT}", ("deep/a.bin",))
    assert "deep/a.bin" in held(fetched["path"]) and "student.bin" not in held(fetched["path"])


def test_everything_that_can_be_wrong_with_a_hub_model_is_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    hub.models["some/tiny"] = {"README.md": b"# a data set", "data.csv": b"1"}
    for arguments, message in [
        (("some/absent",), "no folder and no hub model 'some/absent': check the name; a private model needs `hf auth login`"),
        (
            ("some--tiny/x",),
            "hub model some--tiny/x cannot be fetched: Cannot have -- or .. in repo_id: 'some--tiny/x'.",
        ),
        (("some/gated",), f"hub model some/gated is gated: accept its terms on {hub.url}/some/gated, then run `hf auth login`"),
        (("some/tiny@v9",), f"hub model some/tiny has no revision 'v9': its branches and commits are on {hub.url}/some/tiny"),
        (
            ("some/tiny", ("unet", "vae")),
            "hub model some/tiny is not in diffusers layout: it has none of unet, vae; name one that is",
        ),
    ]:
        assert fetch(tmp_path, hub.url, *arguments) == f"InputError: {message}"


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["no network", "offline mode"])
def test_a_hub_id_without_network_is_one_clear_line(environment: dict[str, str], tmp_path: Path) -> None:
    line = fetch(tmp_path, "http://127.0.0.1:9", "some/tiny", **environment)
    assert line == (
        "SnoopiError: hub model some/tiny is not (whole) in the download cache and http://127.0.0.1:9 cannot be reached: "
        "run again with a network, or give a folder"
    )


def test_a_half_fetched_model_without_network_is_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path, hub.url, "some/tiny", ("tokenizer", "model_index.json"))
    line = fetch(tmp_path, hub.url, "some/tiny", HF_HUB_OFFLINE="1")
    assert line.startswith("SnoopiError: hub model some/tiny is not (whole) in the download cache") and "\n" not in line


def test_a_cache_that_cannot_be_written_is_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    line = fetch(tmp_path, hub.url, "some/tiny", prelude=full)
    assert line == f"OutputError: hub model some/tiny cannot be written to {tmp_path}/hub: File too large"
    assert not [path for path in tmp_path.rglob("*") if "incomplete" in path.name], "nothing half-written remains"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: sai-nc-community\n---\n", "sai-nc-community"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlanguage: en\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\njust words\n---\n", None),
        ("# no front matter", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_card_says(card: str | None, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert find_weights(str(tmp_path)) == WeightsFolder(tmp_path, tmp_path.name, licence, None)


def test_a_folder_is_taken_as_it_is_and_anything_else_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tmp_path / "student"
    (student / "transformer").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"student is not a diffusers model: it has no model_index.json and none of transformer, unet, vae"
    ):
        find_weights(str(student))
    (student / "transformer" / "config.json").write_text("{}")
    assert find_weights(str(student)).path == student
    with pytest.raises(InputError, match=r"none of unet$"):
        find_weights(str(student), parts=("unet",))
    with pytest.raises(InputError, match=r"none of \.$"):
        find_weights(str(student), parts=(".",))
    assert find_weights(str(student / "transformer"), parts=(".",)).name == "transformer"
    monkeypatch.chdir(tmp_path)
    assert find_weights("student").name == find_weights("./student/").name == "student"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_weights("~/student").path == student
    for weights in ("absent", "./absent/model", "/absent/model", "student/transformer/config.json", "https://huggingface.co/a/b"):
        with pytest.raises(InputError, match=f"weights {weights!r} are neither a folder in diffusers layout nor a hub id"):
            find_weights(weights)


def test_a_part_that_other_weights_replace_gives_its_config_alone(hub: Hub, tmp_path: Path) -> None:
    fetched = fetch(tmp_path, hub.url, "some/tiny", ("unet", "tokenizer"), ("unet",))
    assert held(fetched["path"]) == {"README.md", "model_index.json", "unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "model.fp16.safetensors", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (["model.fp16.safetensors", "pytorch_model.fp16.bin", "openvino_model.bin"], ["model.fp16.safetensors"]),
        (
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", "model.safetensors.index.fp16.json"],
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", "model.safetensors.index.fp16.json"],
        ),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.non_ema.safetensors"], ["diffusion_pytorch_model.bin"]),
        (["config.json", "model.onnx", "training_args.bin"], []),
    ],
)
def test_one_set_of_weights_is_chosen(names: list[str], chosen: list[str]) -> None:
    assert weight_files(names) == chosen


def test_of_text_encoders_half_the_precision_is_enough() -> None:
    names = ["model.safetensors", "model.fp16.safetensors", "model.no_ema.safetensors", "pytorch_model.fp16.bin"]
    assert weight_files(names, half=True) == ["model.fp16.safetensors"] and weight_files(names) == ["model.safetensors"]
    assert weight_files(["pytorch_model.bin", "model.fp16-00001-of-00001.safetensors"], half=True) == [
        "model.fp16-00001-of-00001.safetensors"
    ]
    assert weight_files(["model.safetensors", "model.no_ema.safetensors"], half=True) == ["model.safetensors"]


@pytest.mark.parametrize("preset", ["small", "pgsb-sd15"])
def test_the_network_alone_of_a_student_on_no_hub_needs_a_folder(preset: str) -> None:
    with pytest.raises(InputError, match=f"^preset {preset} is on no hub, .*: give its folder as --weights, too$"):
        fetches(find_preset(preset), weights_file=Path("unet.safetensors"))
