"""PixArt with its timesteps folded away and guidance in every cross-attention: the network that is exported.

At one timestep every modulation is a constant: scale and shift become LayerNorm's own weight and bias, and each gate is folded into the
output projection before it, so that no timestep is left. `tests/export/test_pixart.py` checks it against diffusers' own network.
"""

from collections.abc import Callable

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from snoopi_rt.export.attention import (
    GuidedAttention,
    Negative,
    NegativePrompt,
    OneProductAttention,
    both_prompts,
    merge_heads,
    split_heads,
)
from snoopi_rt.export.fold import gated, linear, modulated_norm
from snoopi_rt.export.guidance import Guidance
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.kernels import fused_attention, transposed_attention


class GuidedPixArt(nn.Module):
    """The student as diffusers computes it, with guidance: the reference of the folded network and the exported graph.

    Its inputs and output are FoldedPixArt's. Sets the attention processors of `network`. `size`: height and width in pixels, on which the
    1024 models are conditioned.
    """

    def __init__(
        self, network: PixArtTransformer2DModel, rule: OneStepRule, guidance: Guidance, empty_states: Tensor, size: tuple[int, int]
    ):
        super().__init__()
        self.network, self.rule, self.size = network, rule, size
        network.set_attn_processor(GuidedAttention(guidance, empty_states))

    def forward(
        self,
        noise: Tensor,
        prompt_states: Tensor,
        prompt_mask: Tensor | None = None,
        negative_states: Tensor | None = None,
        negative_mask: Tensor | None = None,
        negative_scale: Tensor | None = None,
        renoise: Tensor | None = None,
    ) -> Tensor:
        negative = None if negative_states is None else (negative_states, negative_mask, negative_scale)

        def network(step: int, latent: Tensor) -> Tensor:
            t = torch.full((len(noise),), self.rule.steps[step].timestep)
            return pixart_prediction(self.network, latent, t, prompt_states, prompt_mask, negative, self.size)

        return self.rule.run(network, noise, renoise)


def pixart_prediction(
    network: PixArtTransformer2DModel,
    x_t: Tensor,
    t: Tensor,
    states: Tensor,
    mask: Tensor | None,
    negative: NegativePrompt | None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """The network's prediction for x_t (B, C, h, w), without a learned variance; see Denoiser.

    `size`: the image's height and width; only the 1024 models are conditioned on it.
    """
    if negative is not None and (project := network.caption_projection) is not None:
        prompt, negative_mask, scale, *empty = negative
        negative = (project(prompt), negative_mask, scale, *map(project, empty))
    condition = size_condition(network, size, len(x_t))
    return network(
        x_t,
        encoder_hidden_states=states,
        timestep=t,
        encoder_attention_mask=None if mask is None else mask.to(x_t.dtype),
        cross_attention_kwargs={"negative": negative},
        added_cond_kwargs={name: None if value is None else value.to(x_t) for name, value in condition.items()},
        return_dict=False,
    )[0][:, : x_t.shape[1]]


class FoldedPixArt(nn.Module):
    """`noise, prompt_states, negative_states, negative_scale, renoise -> latent`; the graph `generator`.

    noise (B, C, h, w); states (B, T, D) and (B, U, D) behind the caption projection; scale (B,); renoise (B, S - 1, C, h, w) for S steps;
    latent (B, C, h, w) fp32. Masks (B, T) and (B, U) bool, or None, tell which tokens count. A guidance of kind none takes no negative.
    `empty_states` (1, T0, D): the empty prompt, for guidance that measures from it. `attention`, `cross_attention`: see
    kernels/ops/reference.py.
    """

    def __init__(
        self,
        network: PixArtTransformer2DModel,
        rule: OneStepRule,
        guidance: Guidance,
        empty_states: Tensor,
        size: tuple[int, int],
        attention: Callable[..., Tensor] = fused_attention,
        cross_attention: Callable[..., Tensor] = transposed_attention,
    ):
        super().__init__()
        self.rule, self.patch = rule, network.config.patch_size
        self.patchify, self.positions = network.pos_embed.proj, Positions(network)
        with torch.no_grad():
            self.steps = nn.ModuleList(
                FoldedTransformer(network, step.timestep, guidance, empty_states, size, attention, cross_attention) for step in rule.steps
            )

    def forward(
        self,
        noise: Tensor,
        prompt_states: Tensor,
        prompt_mask: Tensor | None = None,
        negative_states: Tensor | None = None,
        negative_mask: Tensor | None = None,
        negative_scale: Tensor | None = None,
        renoise: Tensor | None = None,
    ) -> Tensor:
        states, negative = both_prompts(prompt_states, negative_states, negative_scale, negative_mask)

        def network(step: int, latent: Tensor) -> Tensor:
            patches = self.patchify(latent)
            h, w = patches.shape[2:]
            prediction = self.steps[step](patches.flatten(2).transpose(1, 2) + self.positions(h, w), states, prompt_mask, negative)
            prediction = prediction.unflatten(2, (self.patch, self.patch, noise.shape[1])).unflatten(1, (h, w))
            return prediction.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

        return self.rule.run(network, noise, renoise)


class FoldedTransformer(nn.Module):
    """Patches (B, N, D) and text to patches (B, N, p * p * C), at one timestep."""

    def __init__(
        self,
        network: PixArtTransformer2DModel,
        timestep: float,
        guidance: Guidance,
        empty_states: Tensor,
        size: tuple[int, int],
        attention: Callable[..., Tensor],
        cross_attention: Callable[..., Tensor],
    ):
        super().__init__()
        condition = size_condition(network, size, 1)
        modulation, embedded = network.adaln_single(torch.tensor([timestep]), condition, batch_size=1, hidden_dtype=torch.float32)
        self.blocks = nn.ModuleList(
            FoldedBlock(block, modulation, guidance, empty_states, attention, cross_attention) for block in network.transformer_blocks
        )
        shift, scale = (network.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        self.norm = modulated_norm(network.norm_out, scale, shift)
        # A network that also learns the variance predicts 2 C channels; the first C are the mean.
        self.project = _first_channels(network.proj_out, network.out_channels, network.config.in_channels)

    def forward(self, hidden: Tensor, states: Tensor, mask: Tensor | None, negative: Negative | None) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden, states, mask, negative)
        return self.project(self.norm(hidden))


class FoldedBlock(nn.Module):
    """One transformer block at one timestep: self-attention, guided cross-attention, feed-forward."""

    def __init__(
        self,
        block: nn.Module,
        modulation: Tensor,
        guidance: Guidance,
        empty_states: Tensor,
        attention: Callable[..., Tensor],
        cross_attention: Callable[..., Tensor],
    ):
        super().__init__()
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            block.scale_shift_table[None] + modulation.reshape(1, 6, -1)
        ).chunk(6, dim=1)
        self.heads, self.attention = block.attn1.heads, attention
        self.norm1 = modulated_norm(block.norm1, scale_msa, shift_msa)
        # Three products: splitting one product into three copies it.
        self.own_query, self.own_key, self.own_value = block.attn1.to_q, block.attn1.to_k, block.attn1.to_v
        self.out1 = gated(block.attn1.to_out[0], gate_msa)
        self.cross = OneProductAttention(block.attn2, guidance, empty_states, cross_attention)
        self.norm2 = modulated_norm(block.norm2, scale_mlp, shift_mlp)
        self.widen = block.ff.net[0].proj
        self.narrow = gated(block.ff.net[2], gate_mlp)

    def forward(self, hidden: Tensor, states: Tensor, mask: Tensor | None, negative: Negative | None) -> Tensor:
        normed = self.norm1(hidden)
        q, k, v = (split_heads(own(normed), self.heads) for own in (self.own_query, self.own_key, self.own_value))
        hidden = hidden + self.out1(merge_heads(self.attention(q, k, v)))
        hidden = hidden + self.cross(hidden, states, mask, negative)
        return hidden + self.narrow(nn.functional.gelu(self.widen(self.norm2(hidden)), approximate="tanh"))


class Positions(nn.Module):
    """The sinusoidal positions (1, h * w, D) of a grid of patches; those of the network's own size are stored, others are computed."""

    def __init__(self, network: PixArtTransformer2DModel):
        super().__init__()
        embed = network.pos_embed
        self.own, self.kept = (embed.height, embed.width), nn.Buffer(embed.pos_embed.clone())
        self.extent = embed.base_size / embed.interpolation_scale
        quarter = embed.pos_embed.shape[-1] // 4
        self.frequencies = nn.Buffer((10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)).float())

    def forward(self, h: int, w: int) -> Tensor:
        if isinstance(h, int) and (h, w) == self.own:
            return self.kept
        across, down = self._along(w)[None].expand(h, -1, -1), self._along(h)[:, None].expand(-1, w, -1)
        return torch.cat([across, down], -1).flatten(0, 1)[None]

    def _along(self, count: int) -> Tensor:
        angles = (torch.arange(count, dtype=torch.float32) * self.extent / count)[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)


def size_condition(network: PixArtTransformer2DModel, size: tuple[int, int] | None, batch: int) -> dict[str, Tensor | None]:
    """The additional conditions of PixArt-alpha's 1024 models: resolution (B, 2) in pixels and aspect ratio (B, 1); None for others."""
    if not network.config.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    assert size is not None, "this network is conditioned on the size of the image"
    resolution = torch.tensor([size], dtype=torch.float32)
    return {"resolution": resolution.expand(batch, -1), "aspect_ratio": (resolution[:, :1] / resolution[:, 1:]).expand(batch, -1)}


def _first_channels(layer: nn.Linear, out_channels: int, channels: int) -> nn.Linear:
    """The rows of a patch projection that give the first `channels` of `out_channels`; a patch is laid out as (p, p, channel)."""
    weight = layer.weight.unflatten(0, (-1, out_channels))[:, :channels].flatten(0, 1)
    return linear(weight, layer.bias.unflatten(0, (-1, out_channels))[:, :channels].flatten())
