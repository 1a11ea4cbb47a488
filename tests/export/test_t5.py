"""T5 and its tokenizer give what diffusers' PixArt gives, in PyTorch, as a graph, and piece by piece."""

import sys
from pathlib import Path

import pytest
import tiny_students
import torch
from text_encoding import PROMPTS, on_cpu, relative, tokens
from torch import Tensor, nn

from snoopi_rt.engines import load_engine
from snoopi_rt.engines.openvino import import_openvino
from snoopi_rt.errors import InputError, PackageMissing
from snoopi_rt.export.onnx_graphs.write import write_graph
from snoopi_rt.export.text.rule import t5_rule
from snoopi_rt.export.text.t5 import T5TextEncoder, T5Weights, reference_states, skeleton

LENGTHS = (1, 2, 17, 129, 300)


def t5_model(**changes: object) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**{**sizes, **changes}))
    for name, weight in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(weight)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def projection() -> nn.Module:
    from diffusers.models.embeddings import PixArtAlphaTextProjection

    torch.manual_seed(0)
    return PixArtAlphaTextProjection(32, 40).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def t5_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_students.t5_tokenizer(tmp_path_factory.mktemp("t5") / "tokenizer")


def pixart_ids(folder: Path, prompt: str, max_tokens: int) -> list[int]:
    """The real ids of a prompt as PixArt's pipelines make them."""
    from transformers import T5Tokenizer

    output = T5Tokenizer.from_pretrained(folder)(prompt.lower().strip(), padding="max_length", max_length=max_tokens, truncation=True)
    return output.input_ids[: sum(output.attention_mask)]


@pytest.mark.parametrize("max_tokens", [120, 300])
def test_t5_ids_are_the_real_tokens_of_pixart_for_any_prompt(t5_tokenizer_folder: Path, tmp_path: Path, max_tokens: int) -> None:
    rule = t5_rule(t5_tokenizer_folder, tmp_path / "tokenizer.json", max_tokens, 10**6)
    assert (rule.max_tokens, rule.lowercase, rule.pad) == (max_tokens, True, None)
    ours = tokens(rule, tmp_path)
    for prompt in PROMPTS:
        assert ours(prompt, truncate=True).tolist() == [pixart_ids(t5_tokenizer_folder, prompt, max_tokens)]
    assert ours("").tolist() == [[1]]
    with pytest.raises(InputError, match=f"the limit is {max_tokens}"):
        ours(PROMPTS[-1])


def test_a_folder_without_a_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer: it has neither tokenizer\.json nor"):
        t5_rule(tmp_path, tmp_path / "tokenizer.json", 120, 10**6)


def test_t5_ids_from_a_sentencepiece_model_are_those_of_pixart(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    with open(tmp_path / "spiece.model", "wb") as file:
        special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tiny_students.SENTENCES),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
            **special,
        )
    ours = tokens(t5_rule(tmp_path, tmp_path / "tokenizer.json", 120, 10**6), tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "written.json")
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for prompt in PROMPTS:
        assert ours(prompt, truncate=True).tolist() == [pixart_ids(tmp_path, prompt, 120)]
    assert ours("A blue CAT on the moon").tolist() == [[*whole.encode("a blue cat on the moon"), 1]]


def test_a_sentencepiece_model_without_sentencepiece_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(PackageMissing, match=r"spiece\.model is read with sentencepiece, which is not installed"):
        t5_rule(tmp_path, tmp_path / "tokenizer.json", 120, 10**6)


def test_t5_at_a_prompts_own_length_equals_the_padded_diffusers_pipeline(
    t5_tokenizer_folder: Path, tmp_path: Path, projection: nn.Module
) -> None:
    from diffusers import PixArtAlphaPipeline
    from transformers import T5Tokenizer

    model = t5_model()
    tokenizer = T5Tokenizer.from_pretrained(t5_tokenizer_folder)
    pipe = PixArtAlphaPipeline(tokenizer, model, vae=None, transformer=None, scheduler=None)
    ours = tokens(t5_rule(t5_tokenizer_folder, tmp_path / "tokenizer.json", 120, 10**6), tmp_path)
    for prompt in PROMPTS:
        padded, mask, _, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device="cpu", clean_caption=False)
        assert padded.shape[1] == 120
        ids = torch.from_numpy(ours(prompt, truncate=True))
        expected = projection(padded[:, mask[0].bool()])
        assert relative(T5TextEncoder(model, projection)(ids), expected) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "relu", "relative_attention_num_buckets": 8}], ids=["v1.1", "v1.0"])
def test_t5_position_bias_is_right_at_any_length(changes: dict[str, object]) -> None:
    model = t5_model(**changes)
    for length in LENGTHS:
        ids = torch.randint(0, 64, (2, length))
        assert relative(T5TextEncoder(model, nn.Identity())(ids), model(ids).last_hidden_state) < 1e-6


@pytest.mark.parametrize("opset", [20, 23])
def test_t5_graph_takes_any_batch_and_length_in_fp32_and_bf16(tmp_path: Path, projection: nn.Module, opset: int) -> None:
    encoder = T5TextEncoder(t5_model(num_layers=2), projection)
    graph = on_cpu(encoder, torch.zeros(2, 7, dtype=torch.long), {0: "batch", 1: "tokens"}, ["states"], tmp_path / "t5.onnx", opset)
    in_bf16 = import_openvino().Core().compile_model(tmp_path / "t5.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    for batch, length in zip((1, 3, 2, 1, 2), LENGTHS, strict=True):
        ids = torch.randint(0, 64, (batch, length))
        assert relative(graph(ids)["states"], encoder(ids)) < 1e-5
        # 0.009; 0.07 where the graph computes the buckets of the distances by itself.
        assert relative(in_bf16([ids.numpy()])[0], encoder(ids)) < 0.02


def large_t5() -> tuple[nn.Module, Tensor]:
    """A T5 whose states grow beyond what fp16 holds, as T5-XXL's do, and ids."""
    model = t5_model()
    for block in model.encoder.block:
        block.layer[-1].DenseReluDense.wo.weight.mul_(3e5)
    return model, torch.randint(0, 64, (2, 20))


def test_t5_stays_finite_where_fp16_overflows(projection: nn.Module) -> None:
    model, ids = large_t5()
    largest = max(states.abs().max().item() for states in model(ids, output_hidden_states=True).hidden_states)
    assert largest > 2 * torch.finfo(torch.float16).max
    encoder = T5TextEncoder(model, projection)
    exact = T5TextEncoder(model.double(), projection.double())(ids)
    model.float(), projection.float()
    assert relative(encoder(ids).double(), exact) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(encoder(ids).double(), exact) < 0.05


def test_t5_in_fp16_is_refused_and_would_be_wrong(projection: nn.Module) -> None:
    model, ids = large_t5()
    expected = model(ids).last_hidden_state
    assert not relative(model.half()(ids).last_hidden_state.float(), expected) < 0.5
    with pytest.raises(InputError, match="T5 overflows in fp16"):
        T5TextEncoder(model, projection)(ids)


# Piece by piece: what makes 4.7 B parameters exportable.


@pytest.fixture(scope="module", params=["one file", "shards"])
def t5_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    t5_model().save_pretrained(folder, max_shard_size="1GB" if request.param == "one file" else "20KB")
    assert (folder / "model.safetensors").exists() == (request.param == "one file")
    return folder


def test_t5_reference_one_layer_at_a_time_equals_the_whole_model(t5_folder: Path) -> None:
    model = t5_model()
    prompts = [torch.randint(0, 64, (2, length)) for length in LENGTHS]
    for ids, states in zip(prompts, reference_states(t5_folder, prompts), strict=True):
        assert relative(states, model(ids).last_hidden_state) < 1e-6


def test_t5_skeleton_needs_no_memory_and_its_weights_are_found_by_name(t5_folder: Path, projection: nn.Module) -> None:
    empty, full = skeleton(t5_folder, projection), T5TextEncoder(t5_model(), projection)
    assert {value.device.type for value in empty.parameters()} == {"meta"}
    weight_of = T5Weights(t5_folder, projection)
    expected = dict(full.named_parameters())
    assert expected.keys() == dict(empty.named_parameters()).keys()
    for name, value in expected.items():
        assert torch.equal(weight_of(name), value), name
    rows = torch.tensor([5, 0, 63])
    assert torch.equal(weight_of.rows("encoder.embed_tokens.weight", rows), full.encoder.embed_tokens.weight[rows])


@pytest.mark.parametrize("key", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_token_table_is_found_under_either_name(tmp_path: Path, key: str) -> None:
    from safetensors.torch import save_file

    save_file({key: torch.ones(3, 2)}, tmp_path / "model.safetensors")
    assert torch.equal(T5Weights(tmp_path)("encoder.embed_tokens.weight"), torch.ones(3, 2))
    with pytest.raises(InputError, match=r"holds no T5 encoder: encoder\.final_layer_norm\.weight is missing"):
        T5Weights(tmp_path)("encoder.final_layer_norm.weight")


def test_t5_weights_may_be_a_plain_state_dict_of_torch(tmp_path: Path) -> None:
    torch.save({"shared.weight": torch.arange(6.0).reshape(3, 2)}, tmp_path / "pytorch_model.bin")
    assert T5Weights(tmp_path).rows("encoder.embed_tokens.weight", torch.tensor([2])).tolist() == [[4, 5]]


def test_a_folder_without_t5_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json in .*: it is not a part of a diffusers model"):
        reference_states(tmp_path, [torch.zeros(1, 1, dtype=torch.long)])


@pytest.mark.parametrize("t5_folder", ["shards"], indirect=True)
def test_t5_skeleton_exports_and_its_graph_is_filled_one_weight_at_a_time(t5_folder: Path, tmp_path: Path, projection: nn.Module) -> None:
    """What makes 4.7 B parameters exportable: each weight is read as it is written."""
    empty, weight_of, read = skeleton(t5_folder, projection), T5Weights(t5_folder, projection), []
    axes, ids = {"ids": {0: "batch", 1: "tokens"}}, torch.randint(0, 64, (3, 11))

    def tensor_of(name: str) -> Tensor:
        read.append(name)
        return weight_of(name)

    write_graph(empty, {"ids": ids}, ["states"], axes, tmp_path / "t5.onnx", tensor_of=tensor_of)
    assert sorted(read) == sorted(name for name, _ in empty.named_parameters())
    output = load_engine("cpu", tmp_path / "t5.onnx")(ids=ids.numpy())["states"]
    assert relative(output, T5TextEncoder(t5_model(), projection)(ids)) < 1e-5
