"""CLIP's text encoders and tokenizers give what diffusers' pipelines give, in PyTorch and as graphs."""

from pathlib import Path

import pytest
import tiny_students
import torch
from text_encoding import PROMPTS, on_cpu, relative, tokens
from tiny_students import EOS
from torch import nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.text.clip import ClipTextEncoder, SdxlTextEncoder
from snoopi_rt.export.text.rule import clip_rule


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """CLIP tokenizers by their pad."""
    base = tmp_path_factory.mktemp("clip")
    return {pad: tiny_students.clip_tokenizer(base / name, pad) for pad, name in ((EOS, "eos"), ("!", "exclamation"))}


def clip_config(**changes: object) -> object:
    from transformers import CLIPTextConfig

    sizes = {"vocab_size": 520, "hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 3}
    return CLIPTextConfig(**{**sizes, "projection_dim": 24, **changes})


def clip_model(projected: bool = False, **changes: object) -> nn.Module:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(clip_config(**changes))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1, 0.3)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_clip_ids_are_those_of_transformers_for_any_prompt(folders: dict[str, Path], tmp_path: Path, pad: str) -> None:
    from transformers import CLIPTokenizer

    rule = clip_rule(folders[pad], tmp_path / "tokenizer.json", 10**6)
    theirs = CLIPTokenizer.from_pretrained(folders[pad])
    assert (rule.max_tokens, rule.lowercase, rule.pad) == (77, False, theirs.pad_token_id)
    ours = tokens(rule, tmp_path)
    for prompt in PROMPTS:
        expected = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours(prompt, truncate=True).tolist() == [expected]
    with pytest.raises(InputError, match="the limit is 77"):
        ours(PROMPTS[-1])


def test_a_clip_tokenizer_may_lie_in_one_file_as_transformers_saves_it(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(folders["!"]).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.json").exists()
    again = clip_rule(tmp_path / "saved", tmp_path / "again.json", 10**6)
    rule = clip_rule(folders["!"], tmp_path / "tokenizer.json", 10**6)
    for prompt in PROMPTS[:-1]:
        assert tokens(again, tmp_path)(prompt).tolist() == tokens(rule, tmp_path)(prompt).tolist()


def test_a_folder_without_a_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer: it has neither tokenizer\.json nor"):
        clip_rule(tmp_path, tmp_path / "tokenizer.json", 10**6)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "num_hidden_layers": 2}], ids=["sd15", "sd21"])
def test_clip_states_are_those_of_the_diffusers_pipeline(folders: dict[str, Path], tmp_path: Path, changes: dict[str, object]) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    model = clip_model(**changes)
    parts = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        **parts, tokenizer=CLIPTokenizer.from_pretrained(folders["!"]), text_encoder=model, requires_safety_checker=False
    )
    tokenizer = tokens(clip_rule(folders["!"], tmp_path / "tokenizer.json", 10**6), tmp_path)
    for prompt in PROMPTS:
        expected, _ = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        assert relative(ClipTextEncoder(model)(torch.from_numpy(tokenizer(prompt, truncate=True))), expected) < 1e-6


@pytest.mark.parametrize("eos", [2, 519], ids=["old config", "new config"])
def test_sdxl_states_and_pooled_state_are_those_of_the_diffusers_pipeline(folders: dict[str, Path], tmp_path: Path, eos: int) -> None:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    models = clip_model(eos_token_id=eos), clip_model(True, eos_token_id=eos, hidden_act="gelu", hidden_size=48)
    tokenizers = [CLIPTokenizer.from_pretrained(folders[pad]) for pad in (EOS, "!")]
    assert tokenizers[0].eos_token_id == 519
    parts = dict(zip(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), (*models, *tokenizers), strict=True))
    pipe = StableDiffusionXLPipeline(**parts, vae=None, unet=None, scheduler=None, add_watermarker=False)
    encoder = SdxlTextEncoder(*models, eos=519, pads=(519, 0))
    tokenizer = tokens(clip_rule(folders[EOS], tmp_path / "tokenizer.json", 10**6), tmp_path)
    for prompt in (prompt.replace("!", "") for prompt in PROMPTS):
        expected, _, wanted_pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        states, pooled = encoder(torch.from_numpy(tokenizer(prompt, truncate=True)))
        assert states.shape == (1, 77, 32 + 48)
        assert relative(states, expected) < 1e-6
        assert relative(pooled, wanted_pooled) < 1e-6


def test_an_exclamation_mark_in_a_prompt_stays_a_word_in_sdxl() -> None:
    encoder = SdxlTextEncoder(nn.Identity(), nn.Identity(), eos=9, pads=(9, 0))
    ids = torch.tensor([[8, 0, 1, 9, 9, 9], [8, 1, 9, 2, 9, 9], [8, 9, 9, 9, 9, 9], [8, 1, 2, 3, 4, 9]])
    expected = [[8, 0, 1, 9, 0, 0], [8, 1, 9, 2, 9, 0], [8, 9, 0, 0, 0, 0], [8, 1, 2, 3, 4, 9]]
    assert encoder._padded_for_second(ids).tolist() == expected
    other = SdxlTextEncoder(nn.Identity(), nn.Identity(), eos=9, pads=(7, 0))
    assert other._padded_for_second(torch.tensor([[8, 1, 9, 7, 7], [8, 1, 2, 3, 9]])).tolist() == [[8, 1, 9, 0, 0], [8, 1, 2, 3, 9]]


@pytest.mark.parametrize("opset", [20, 23])
def test_clip_graphs_take_any_batch(tmp_path: Path, opset: int) -> None:
    torch.manual_seed(1)
    ids = torch.randint(0, 519, (3, 77))
    ids[0, 30:], ids[1, 2:], ids[2, 76:] = 519, 519, 519
    one = ClipTextEncoder(clip_model(num_hidden_layers=1))
    graph = on_cpu(one, ids[:2], {0: "batch"}, ["states"], tmp_path / "one.onnx", opset)
    assert relative(graph(ids)["states"], one(ids)) < 1e-5
    both = SdxlTextEncoder(clip_model(num_hidden_layers=2), clip_model(True, eos_token_id=2, num_hidden_layers=2), eos=519, pads=(519, 0))
    graph = on_cpu(both, ids[:2], {0: "batch"}, ["states", "pooled"], tmp_path / "both.onnx", opset)
    for output, expected in zip(graph(ids).values(), both(ids), strict=True):
        assert relative(output, expected) < 1e-5
