"""T5 for PixArt: prompt ids at their real length to projected token states; and a T5 larger than the memory, layer by layer.

Nothing here computes in fp16: T5's states grow beyond 65504, which ends in a black image.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from snoopi_rt.engines.messages import why
from snoopi_rt.errors import InputError
from snoopi_rt.export.weights.checkpoint import config_path, read_config, read_weights, transformers_config
from snoopi_rt.export.weights.hub import weight_files
from snoopi_rt.export.weights.lora import Product


class T5TextEncoder(nn.Module):
    """ids (B, T) to states (B, T, D): the last hidden state of a T5EncoderModel, then the network's caption projection.

    Every id counts: prompts run at their real length. Raises InputError for weights in fp16.
    """

    def __init__(self, model: nn.Module, projection: nn.Module):
        super().__init__()
        self.encoder, self.projection = model.encoder, projection
        # Each distance's bucket as a number: transformers takes a logarithm, which in OpenVINO's bf16 puts tokens into other buckets
        # (relative L2 of the states at 60 tokens: 0.14, from this table 0.008).
        self.reach = model.config.relative_attention_max_distance
        distances = torch.arange(-self.reach, self.reach + 1, device="cpu")
        attention, count = self.encoder.block[0].layer[0].SelfAttention, model.config.relative_attention_num_buckets
        buckets = attention._relative_position_bucket(distances, bidirectional=True, num_buckets=count, max_distance=self.reach)
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        if self.encoder.final_layer_norm.weight.dtype == torch.float16:
            raise InputError("T5 overflows in fp16: export its text encoder in fp32, bf16, int8 or int4")
        states, bias = self.encoder.embed_tokens(ids), self._position_bias(ids.shape[1])
        for block in self.encoder.block:
            states = block(states, None, bias)[0]
        return self.projection(self.encoder.final_layer_norm(states))

    def _position_bias(self, length: int) -> Tensor:
        """The relative position bias, (1, heads, T, T); all distances beyond `reach` share one."""
        position = torch.arange(length, device=self.buckets.device)
        distance = (position - position[:, None]).clamp(-self.reach, self.reach)
        by_distance = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias(self.buckets)
        return F.embedding(distance + self.reach, by_distance).permute(2, 0, 1)[None]


def skeleton(folder: Path, projection: nn.Module) -> T5TextEncoder:
    """The text encoder of a T5 folder with its parameters on the meta device, where they take no memory; T5Weights has their values.

    Raises InputError if the folder holds no T5 or one of another width than the caption `projection` takes.
    """
    from transformers import T5EncoderModel

    config, width = t5_config(folder), projection.linear_1.in_features
    if config.d_model != width:
        raise InputError(
            f"the T5 in {folder} gives states of {config.d_model}, the network takes {width}: choose the one it was trained with"
        )
    with torch.device("meta"):
        model = T5EncoderModel(config)
    return T5TextEncoder(model, copy.deepcopy(projection).to("meta")).eval().requires_grad_(False)


class T5Weights:
    """The parameters of a T5TextEncoder by name, each read from the folder's files on demand, in the dtype that it has there.

    `updates`: what LoRAs add to some of them, which are then fp32.
    Raises InputError as read_weights does, and for a parameter that the folder lacks.
    """

    KIND = "T5"

    def __init__(self, folder: Path, projection: nn.Module | None = None, updates: Mapping[str, Sequence[Product]] | None = None):
        self._folder, self._updates = folder, updates or {}
        files = [folder / name for name in weight_files(path.name for path in folder.iterdir()) if not name.endswith(".json")]
        self._file_of = {key: file for file in files for key in read_weights(file)}
        self._projection = {} if projection is None else {f"projection.{name}": value for name, value in projection.state_dict().items()}

    def __call__(self, name: str) -> Tensor:
        weight = self._projection[name] if name in self._projection else self._mapped(name).clone()
        for product in self._updates.get(name, ()):
            weight = product.added(weight.float())
        return weight

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows `index` (N,) of a matrix, (N, D), without reading the others."""
        return self._mapped(name)[index]

    def load(self, module: nn.Module, prefix: str) -> nn.Module:
        """A module of the encoder with its parameters in fp32, for evaluation. Raises InputError for weights of other shapes."""
        weights = {name: self(f"{prefix}.{name}").float() for name in module.state_dict()}
        try:
            module.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise InputError(f"{self._folder} holds weights of other shapes than its config describes: {why(error)}") from error
        return module.eval()

    def names(self, name: str) -> tuple[str, ...]:
        """What a checkpoint may call the parameter: the table that encoder and decoder share has one of two names, or both."""
        return (name, "shared.weight") if name == "encoder.embed_tokens.weight" else (name,)

    def _mapped(self, name: str) -> Tensor:
        key = next((key for key in self.names(name) if key in self._file_of), None)
        if key is None:
            raise InputError(f"{self._folder} holds no {self.KIND} encoder: {name} is missing")
        # Mapped again each time: pages of a mapped file count as this process's memory while it stays mapped.
        return read_weights(self._file_of[key])[key]


@torch.no_grad()
def reference_states(folder: Path, prompts: Sequence[Tensor], updates: Mapping[str, Sequence[Product]] | None = None) -> list[Tensor]:
    """The last hidden state (B, T, D) of a folder's T5EncoderModel for each of `prompts`, ids (B, T), in fp32.

    One layer is in memory at a time and runs on all prompts. transformers' own blocks and position bias compute it: the reference for
    exported variants.
    """
    from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

    config, weights = t5_config(folder), T5Weights(folder, updates=updates)
    used = torch.cat([ids.flatten() for ids in prompts]).unique()
    table = weights.rows("encoder.embed_tokens.weight", used).float()
    states = [table[torch.searchsorted(used, ids)] for ids in prompts]
    biases: list[Tensor | None] = [None] * len(states)
    for number in tqdm(range(config.num_layers), desc="text reference", unit="layer", leave=False):
        with torch.device("meta"):
            block = T5Block(config, has_relative_attention_bias=number == 0)
        weights.load(block, f"encoder.block.{number}")
        for i, bias in enumerate(biases):
            states[i], biases[i], _ = block(states[i], None, bias)
    norm = weights.load(T5LayerNorm(config.d_model, config.layer_norm_epsilon), "encoder.final_layer_norm")
    return [norm(hidden) for hidden in states]


def t5_config(folder: Path) -> Any:
    """The T5Config of a folder. Raises InputError for another or a damaged one."""
    from transformers import T5EncoderModel

    path = config_path(folder)
    return transformers_config(T5EncoderModel, read_config(path, T5EncoderModel), path, attn_implementation="eager")
