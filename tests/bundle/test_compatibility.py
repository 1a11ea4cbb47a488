"""Parts that do not fit each other are refused, at export and at load; and no export is done before its bundle has drawn."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_students
import torch
from torch import nn

from snoopi_rt.bundle.bundle import GRAPHS, Bundle, File, Latent
from snoopi_rt.bundle.onnx_file import embedded_tokens
from snoopi_rt.errors import BundleError, InputError, OutputError
from snoopi_rt.export import final_check
from snoopi_rt.export.exporter import export
from snoopi_rt.export.final_check import Extreme, draw_whole
from snoopi_rt.export.onnx_graphs.write import write_graph
from snoopi_rt.export.options import ExportOptions
from snoopi_rt.export.source import find_source
from snoopi_rt.export.text.clip import SdxlTextEncoder
from snoopi_rt.pipeline import EMBEDDED

OPTIONS = ExportOptions(precision={graph: ["fp32"] for graph in GRAPHS}, sizes=((64, 64),))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_students.stable_diffusion(tmp_path_factory.mktemp("fit") / "sd15", "sd15", levels=1, mid_block_type=None, tiny_vae=True)


@pytest.fixture(scope="module")
def exported(student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[str]]:
    """A bundle and what its export said."""
    lines: list[str] = []
    out = tmp_path_factory.mktemp("exported") / "bundle"
    return export(find_source("sd15", str(student), "pgsb-sd15"), out, OPTIONS, lines.append), lines


def with_one_token_more(tokenizer: Path) -> None:
    """What textual inversion does to a tokenizer, without doing it to the text encoder."""
    document = json.loads(tokenizer.read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    number = max([*vocabulary.values(), *(token["id"] for token in document["added_tokens"])]) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    document["added_tokens"].append({"id": number, "content": "<my-style>", **flags})
    tokenizer.write_text(json.dumps(document), encoding="utf-8")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_at_load(folder: Path) -> None:
    with_one_token_more(folder / "tokenizer.json")
    document = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    document["text"]["tokenizer"] = vars(File.of(folder / "tokenizer.json"))
    (folder / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(BundleError, match=r"tokenizer.json has token ids up to 10, text_encoder.onnx has embeddings for 10: they"):
            Bundle.load(folder)


def test_a_pad_beyond_the_embeddings_is_refused_at_load(folder: Path, original: Bundle) -> None:
    with pytest.raises(BundleError, match=r"prompts are padded with token id 99, text_encoder.onnx has embeddings for 10"):
        replace(original, text=replace(original.text, pad=99)).save(folder)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_at_export(student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<my-style>": 520}', encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer has token ids up to 520, its text encoder has embeddings for 520: fetch both"):
        export(find_source("sd15", str(folder), "pgsb-sd15"), tmp_path / "bundle", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("change", [{"max_position_embeddings": 40}, {"hidden_size": 16}], ids=["positions", "width"])
def test_a_text_encoder_of_another_model_is_one_clear_line(student: Path, tmp_path: Path, change: dict[str, int]) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = Path(shutil.copytree(student, tmp_path / "student"))
    sizes: dict[str, Any] = {
        "vocab_size": 520,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    }
    config = CLIPTextConfig(**sizes | change, bos_token_id=518, eos_token_id=519, pad_token_id=519)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    with pytest.raises(InputError, match=r"has positions for 40 tokens, prompts have 77|gives states of 16, the network takes 32"):
        export(find_source("sd15", str(folder), "pgsb-sd15"), tmp_path / "bundle", OPTIONS)


def test_embeddings_are_counted_however_their_table_is_stored(tmp_path: Path) -> None:
    """As int8 with a scale a row and as fp16; one table, or two of which the second gets other pads."""
    assert embedded_tokens(EMBEDDED / "text_encoder-fp16.onnx") == 30522
    assert embedded_tokens(EMBEDDED / "generator-fp16.onnx") is None
    folder = tiny_students.stable_diffusion(tmp_path / "sdxl", "sdxl", levels=1, mid_block_type=None, tiny_vae=True)
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

    models = [
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
    ]
    two, ids = SdxlTextEncoder(*models, eos=519, pads=(519, 0)).eval(), torch.randint(0, 500, (2, 77))
    write_graph(two, {"ids": ids}, ["states", "pooled"], {"ids": {0: "batch"}}, tmp_path / "two.onnx", "fp16")
    assert embedded_tokens(tmp_path / "two.onnx") == 520

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = T5EncoderModel.from_pretrained(tiny_students.t5(tmp_path / "t5", 24))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids).last_hidden_state

    axes = {"ids": {0: "batch", 1: "tokens"}}
    write_graph(Last().eval(), {"ids": ids[:, :9] % 64}, ["states"], axes, tmp_path / "int4.onnx", "int4")
    assert embedded_tokens(tmp_path / "int4.onnx") == 64


def spec(graph: str, name: str, axis: int, size: int) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        variant = document["graphs"][graph][0]
        next(each for each in (*variant["inputs"], *variant["outputs"]) if each["name"] == name)["shape"][axis] = size

    return change


@pytest.mark.parametrize(
    "change",
    [
        spec("generator", "noise", 1, 8),
        spec("generator", "noise", 2, 16),
        spec("generator", "prompt_states", 2, 5),
        spec("generator", "latent", 1, 3),
        spec("decoder", "latent", 1, 16),
        spec("decoder", "image", 1, 512),
        spec("decoder", "image", 3, 4),
        spec("text_encoder", "states", 2, 7),
        lambda document: document["graphs"]["generator"][0]["inputs"][1].update(shape=[]),
        lambda document: (
            document.update(latent={"channels": 4, "factor": 4}, sizes=[[16, 16]]) or spec("decoder", "image", 1, 32)(document)
        ),
    ],
)
def test_shapes_that_do_not_fit_each_other_are_refused_at_load(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    change(document)
    (folder / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=r"bundle.json: \w+.onnx has \w+ of shape .* the other parts need"):
        Bundle.load(folder)


def test_export_draws_the_longest_prompt_and_the_highest_token_id_on_every_engine(exported: tuple[Bundle, list[str]]) -> None:
    bundle, lines = exported
    assert [line for line in lines if line.startswith("drawn whole")] == [
        f"drawn whole on {engine}: the longest prompt, the highest token id" for engine in bundle.engines()
    ]


def test_a_text_encoder_that_gives_something_else_on_an_engine_stops_the_export(exported: tuple[Bundle, list[str]]) -> None:
    bundle, _ = exported
    ids = torch.full((1, 77), 519)
    for states, told in (
        (torch.zeros(1, 77, 32) + 9, r"other states than PyTorch on engine 'cpu' for the longest prompt .relative L2"),
        (torch.zeros(1, 5, 32), r"gives states of shape \(1, 77, 32\) on engine 'cpu', PyTorch \(1, 5, 32\)"),
    ):
        with pytest.raises(OutputError, match=told):
            draw_whole(bundle, ["cpu"], [Extreme("the longest prompt", ids, {"states": states})] * 2, lambda line: None)


def test_a_decoder_of_another_factor_than_promised_is_found_out(
    exported: tuple[Bundle, list[str]], original: Bundle, folder: Path, functions
) -> None:
    """By the shapes where they are fixed, else by drawing."""
    with pytest.raises(BundleError, match=r"image of shape .* the other parts need"):
        replace(exported[0], latent=Latent(4, 16), sizes=((128, 128),))
    free = replace(original, latent=Latent(4, 4)).save(folder)
    ids = torch.tensor([[0, 3, 4, 1]])
    states = torch.from_numpy(functions["text_encoder"](ids.numpy())["states"])
    with pytest.raises(BundleError, match=r"decoder of bundle 'tiny' gave \(1, 8, 8, 3\) but \(1, 16, 16, 3\) is promised"):
        draw_whole(free, ["cpu"], [Extreme(name, ids, {"states": states}) for name in ("one", "other")], lambda line: None)


def test_an_export_that_cannot_draw_leaves_nothing(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(final_check, "MAX_DISTANCE", -1.0)  # what no text encoder can be near to
    with pytest.raises(OutputError, match="the bundle would draw something else"):
        export(find_source("sd15", str(student), "pgsb-sd15"), tmp_path / "bundle", OPTIONS)
    assert not list(tmp_path.iterdir())
