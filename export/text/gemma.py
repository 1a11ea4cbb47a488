"""Gemma 2 as SANA reads it: an instruction and a prompt to projected token states; and a Gemma too large for memory, piece by piece.

It is causal, so that an instruction before every prompt is the same to all of them: its keys and values in every layer are constants of
the graph, and a prompt costs its own tokens alone.
"""

import copy
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from snoopi_rt.errors import InputError
from snoopi_rt.export.text.t5 import T5Weights
from snoopi_rt.export.weights.checkpoint import config_path, read_config, transformers_config
from snoopi_rt.export.weights.lora import Product

TOGETHER = 32
"""Prompts that are as long, once filled to a multiple of this, run through a layer together: each reads all of its weights."""


def instruction() -> str:
    """What SANA-Sprint is told before every prompt: the default of diffusers' pipeline."""
    from diffusers import SanaSprintPipeline

    return "\n".join(signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default)


class GemmaTextEncoder(nn.Module):
    """ids (B, T) to states (B, T, D): the last hidden state of a Gemma2Model behind the instruction, then the network's projection.

    The first id stands for the instruction's first token, whose state is a constant as well; the others are the prompt's own, at least one.
    Its buffers are on the meta device, InstructedGemma.constants has their values: key_i and value_i (1, H, known, d), the instruction's
    in layer i; first (1, 1, D), that first state before the norm; cos and sin (max_tokens, d), the rotation behind the instruction.
    """

    def __init__(self, model: nn.Module, projection: nn.Module, known: int, max_tokens: int):
        super().__init__()
        config = model.config
        self.embed_tokens, self.layers, self.norm, self.projection = model.embed_tokens, model.layers, model.norm, projection
        before, rotation = (1, config.num_key_value_heads, known, config.head_dim), (max_tokens, config.head_dim)
        shapes = {f"{name}_{number}": before for number in range(len(self.layers)) for name in ("key", "value")}
        for name, shape in (*shapes.items(), ("first", (1, 1, config.hidden_size)), ("cos", rotation), ("sin", rotation)):
            self.register_buffer(name, torch.empty(shape, device="meta"))

    def forward(self, ids: Tensor) -> Tensor:
        own = ids[:, 1:]
        count, hidden = own.shape[1], _embedded(F.embedding(own, self.embed_tokens.weight))
        for number, layer in enumerate(self.layers):
            before = getattr(self, f"key_{number}"), getattr(self, f"value_{number}")
            hidden, *_ = run_layer(layer, hidden, self.cos[:count], self.sin[:count], before)
        states = torch.cat([self.first.expand(ids.shape[0], -1, -1), hidden], 1)
        return self.projection(self.norm(states))


def run_layer(
    layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, before: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a Gemma2DecoderLayer makes of hidden (B, T, D), and the keys and values (B, H, T, d) of these tokens.

    cos, sin (T, d): the rotation of their positions. before: keys and values (1, H, S, d) of what stands before them.
    """
    attn = layer.self_attn
    normed = layer.input_layernorm(hidden)
    q, k, v = (project(normed).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    keys, values = k, v
    if before is not None:
        keys, values = (torch.cat([old.expand(x.shape[0], -1, -1, -1), x], 2) for old, x in zip(before, (k, v), strict=True))
    # Several heads of queries share one of keys.
    scores = q.unflatten(1, (keys.shape[1], -1)) * attn.scaling @ keys.unsqueeze(2).transpose(-1, -2)
    if (limit := attn.attn_logit_softcapping) is not None:
        scores = (scores / limit).tanh() * limit
    place = torch.arange(q.shape[2], device=hidden.device)
    later = torch.arange(keys.shape[2], device=hidden.device) - (keys.shape[2] - q.shape[2]) > place[:, None]
    weights = scores.masked_fill(later, torch.finfo(scores.dtype).min).softmax(-1)
    z = (weights @ values.unsqueeze(2)).flatten(1, 2).transpose(1, 2).flatten(2)
    hidden = hidden + layer.post_attention_layernorm(attn.o_proj(z))
    return hidden + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden))), k, v


class InstructedGemma:
    """The Gemma 2 of a folder behind an instruction: its `skeleton` for the graph, the values of that by name, and states of prompts.

    known: ids of the instruction that no prompt changes. One layer is in memory at a time.
    Raises InputError if the folder holds no Gemma 2, or one that the instruction and a prompt are too long for.
    """

    def __init__(self, folder: Path, known: Sequence[int], max_tokens: int):
        self.folder, self.config = folder, gemma_config(folder)
        self._ids, self._max_tokens = torch.tensor([list(known)]), max_tokens
        self._constants: dict[str, Tensor] = {}
        most = min(self.config.sliding_window or self.config.max_position_embeddings, self.config.max_position_embeddings)
        if len(known) + max_tokens > most:
            raise InputError(f"the Gemma in {folder} sees {most} tokens, the instruction has {len(known)} and a prompt up to {max_tokens}")

    def skeleton(self, projection: nn.Module) -> GemmaTextEncoder:
        """The text encoder with its parameters on the meta device, where they need no memory; `tensor_of` has their values."""
        from transformers import Gemma2Model

        with torch.device("meta"):
            model = Gemma2Model(self.config)
        encoder = GemmaTextEncoder(model, copy.deepcopy(projection).to("meta"), self._ids.shape[1], self._max_tokens)
        return encoder.eval().requires_grad_(False)

    def constants(self, updates: Mapping[str, Sequence[Product]] | None = None) -> Mapping[str, Tensor]:
        """The values of a GemmaTextEncoder's buffers by name."""
        if not self._constants:
            self.states([], updates)
        return self._constants

    @torch.no_grad()
    def states(self, prompts: Sequence[Tensor], updates: Mapping[str, Sequence[Product]] | None = None) -> list[Tensor]:
        """The last hidden state (1, T, D) in fp32 of each of `prompts`, ids (1, T) as GemmaTextEncoder takes them.

        What exported variants are measured against. `updates`: what LoRAs add to the weights, by parameter name.
        """
        from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RMSNorm

        config, weights = self.config, GemmaWeights(self.folder, updates=updates)
        groups: dict[int, list[int]] = {}
        for i, ids in enumerate(prompts):
            groups.setdefault(-(-ids.shape[1] // TOGETHER) * TOGETHER, []).append(i)
        # It is causal: what a row is filled up with changes nothing before it.
        rows = [torch.cat([F.pad(prompts[i][:, 1:], (0, length - prompts[i].shape[1])) for i in group]) for length, group in groups.items()]
        used = torch.cat([ids.flatten() for ids in (self._ids, *rows)]).unique()
        table = weights.rows("embed_tokens.weight", used).float()
        known, *hidden = (_embedded(table[torch.searchsorted(used, ids)]) for ids in (self._ids, *rows))
        count = self._ids.shape[1]
        start, (cos, sin) = _rotation(config, 0, count), _rotation(config, count, max([self._max_tokens, *groups]))
        for number in tqdm(range(config.num_hidden_layers), desc="text reference", unit="layer", leave=False):
            with torch.device("meta"):
                layer = Gemma2DecoderLayer(config, number)
            weights.load(layer, f"layers.{number}")
            known, key, value = run_layer(layer, known, *start)
            for i, x in enumerate(hidden):
                hidden[i], *_ = run_layer(layer, x, cos[: x.shape[1]], sin[: x.shape[1]], (key, value))
            self._constants |= {f"key_{number}": key, f"value_{number}": value}
        self._constants |= {"first": known[:, :1], "cos": cos[: self._max_tokens], "sin": sin[: self._max_tokens]}
        norm = weights.load(Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps), "norm")
        states = {i: x[row : row + 1] for group, x in zip(groups.values(), hidden, strict=True) for row, i in enumerate(group)}
        return [norm(torch.cat([known[:, :1], states[i][:, : ids.shape[1] - 1]], 1)) for i, ids in enumerate(prompts)]


class GemmaWeights(T5Weights):
    """The same of a GemmaTextEncoder, but for the instruction's constants; some checkpoints have `model.` before every name."""

    KIND = "Gemma 2"

    def names(self, name: str) -> tuple[str, ...]:
        """What a checkpoint may call the parameter."""
        return name, f"model.{name}"


def gemma_config(folder: Path) -> Any:
    """The Gemma2Config of a folder. Raises InputError for another or a damaged one, and for one that reads both ways."""
    from transformers import Gemma2Model

    path = config_path(folder)
    config = transformers_config(Gemma2Model, read_config(path, Gemma2Model), path)
    if config.use_bidirectional_attention:
        raise InputError(f"the Gemma in {folder} is not causal, which is not supported")
    return config


def _embedded(rows: Tensor) -> Tensor:
    return rows * rows.shape[-1] ** 0.5


def _rotation(config: Any, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (count, d) by which queries and keys are turned at the positions from `start` on."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding

    with torch.device("cpu"):
        cos, sin = Gemma2RotaryEmbedding(config)(torch.zeros(1), torch.arange(start, start + count)[None])
    return cos[0], sin[0]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
