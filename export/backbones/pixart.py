"""PixArt with its one timestep folded away and guidance in every cross-attention: the network that is exported.

At one timestep every modulation is a constant: scale and shift become LayerNorm's own weight and bias, and each gate goes into the output
projection behind it. What is left has no timestep at all. `tests/test_export.py` holds it against diffusers' own network.
"""

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from snoopi_rt.export.attention import GuidedAttention, merge_heads, split_heads
from snoopi_rt.export.guidance import Guidance
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.kernels import attention


class GuidedPixArt(nn.Module):
    """The student as diffusers computes it, with guidance: what the folded network and the exported graph are checked against.

    Takes and gives what FoldedPixArt does. Sets the attention processors of `network`.
    """

    def __init__(self, network: PixArtTransformer2DModel, rule: OneStepRule, guidance: Guidance, empty_states: Tensor):
        super().__init__()
        self.network, self.rule = network, rule
        network.set_attn_processor(GuidedAttention(guidance, empty_states))

    def forward(
        self,
        noise: Tensor,
        prompt_states: Tensor,
        prompt_mask: Tensor,
        negative_states: Tensor | None = None,
        negative_mask: Tensor | None = None,
        negative_scale: Tensor | None = None,
    ) -> Tensor:
        negative = None if negative_states is None else (negative_states, negative_mask, negative_scale)
        answer = self.network(
            self.rule.input_scale * noise,
            encoder_hidden_states=prompt_states,
            timestep=torch.full((len(noise),), self.rule.timestep),
            encoder_attention_mask=prompt_mask.to(noise.dtype),
            cross_attention_kwargs={"negative": negative},
            return_dict=False,
        )[0]
        return self.rule.x0(noise, answer[:, : noise.shape[1]])


class FoldedPixArt(nn.Module):
    """`noise, prompt_states, prompt_mask, negative_states, negative_mask, negative_scale -> latent`; see design of the graphs.

    noise (B, C, h, w); states (B, T, D) and (B, U, D) behind the caption projection; masks (B, T) and (B, U) bool; scale (B,); latent
    (B, C, h, w) fp32. A guidance of kind none takes only the first three.
    `empty_states` (1, T0, D): the empty prompt, for guidance that measures from it.
    """

    def __init__(self, network: PixArtTransformer2DModel, rule: OneStepRule, guidance: Guidance, empty_states: Tensor):
        super().__init__()
        self.rule = rule
        self.channels = network.config.in_channels
        self.patch = network.config.patch_size
        self.patchify = network.pos_embed.proj
        self.positions = nn.Buffer(network.pos_embed.pos_embed.clone())
        modulation, embedded = network.adaln_single(
            torch.tensor([rule.timestep]), {"resolution": None, "aspect_ratio": None}, batch_size=1, hidden_dtype=torch.float32
        )
        self.blocks = nn.ModuleList(FoldedBlock(block, modulation, guidance, empty_states) for block in network.transformer_blocks)
        shift, scale = (network.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        self.norm = _modulated_norm(network.norm_out, scale, shift)
        # A network that also learns the variance answers 2 C channels; the first C are the mean.
        self.project = _first_channels(network.proj_out, self.patch**2, network.out_channels, self.channels)

    def forward(
        self,
        noise: Tensor,
        prompt_states: Tensor,
        prompt_mask: Tensor,
        negative_states: Tensor | None = None,
        negative_mask: Tensor | None = None,
        negative_scale: Tensor | None = None,
    ) -> Tensor:
        # One key and one value product serve both prompts.
        states = prompt_states if negative_states is None else torch.cat([prompt_states, negative_states], 1)
        hidden = self.patchify(self.rule.input_scale * noise).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            hidden = block(hidden, states, prompt_mask, negative_mask, negative_scale)
        patches = self.project(self.norm(hidden))
        h, w, p = noise.shape[2] // self.patch, noise.shape[3] // self.patch, self.patch
        answer = patches.view(-1, h, w, p, p, self.channels).permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, h * p, w * p)
        return self.rule.x0(noise, answer)


class FoldedBlock(nn.Module):
    """One transformer block at one timestep: self-attention, guided cross-attention, feed-forward."""

    def __init__(self, block: nn.Module, modulation: Tensor, guidance: Guidance, empty_states: Tensor):
        super().__init__()
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            block.scale_shift_table[None] + modulation.reshape(1, 6, -1)
        ).chunk(6, dim=1)
        self.guidance, self.heads = guidance, block.attn1.heads
        self.norm1 = _modulated_norm(block.norm1, scale_msa, shift_msa)
        self.qkv = _stacked(block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        self.out1 = _gated(block.attn1.to_out[0], gate_msa)
        self.query = block.attn2.to_q
        self.key, self.value = block.attn2.to_k, block.attn2.to_v
        self.out2 = block.attn2.to_out[0]
        self.norm2 = _modulated_norm(block.norm2, scale_mlp, shift_mlp)
        self.widen = block.ff.net[0].proj
        self.narrow = _gated(block.ff.net[2], gate_mlp)
        if guidance.measures_from_empty:
            self.key_empty = nn.Buffer(split_heads(self.key(empty_states), self.heads).detach())
            self.value_empty = nn.Buffer(split_heads(self.value(empty_states), self.heads).detach())

    def forward(
        self, hidden: Tensor, states: Tensor, prompt_mask: Tensor, negative_mask: Tensor | None, negative_scale: Tensor | None
    ) -> Tensor:
        q, k, v = (split_heads(x, self.heads) for x in self.qkv(self.norm1(hidden)).chunk(3, -1))
        hidden = hidden + self.out1(merge_heads(attention(q, k, v)))
        hidden = hidden + self.out2(merge_heads(self._cross(hidden, states, prompt_mask, negative_mask, negative_scale)))
        return hidden + self.narrow(nn.functional.gelu(self.widen(self.norm2(hidden)), approximate="tanh"))

    def _cross(self, hidden: Tensor, states: Tensor, prompt_mask: Tensor, negative_mask: Tensor | None, scale: Tensor | None) -> Tensor:
        q, k, v = (
            split_heads(self.query(hidden), self.heads),
            split_heads(self.key(states), self.heads),
            split_heads(self.value(states), self.heads),
        )
        if self.guidance.attend is None or negative_mask is None:
            return attention(q, k, v, prompt_mask)
        t = prompt_mask.shape[1]
        empty = (self.key_empty, self.value_empty) if self.guidance.measures_from_empty else ()
        return self.guidance.attend(q, k[:, :, :t], v[:, :, :t], prompt_mask, k[:, :, t:], v[:, :, t:], negative_mask, scale, *empty)


def _modulated_norm(norm: nn.Module, scale: Tensor, shift: Tensor) -> nn.LayerNorm:
    folded = nn.LayerNorm(scale.shape[-1], eps=norm.eps)
    folded.weight.data, folded.bias.data = (1 + scale).flatten().detach().clone(), shift.flatten().detach().clone()
    return folded


def _gated(linear: nn.Linear, gate: Tensor) -> nn.Linear:
    folded = nn.Linear(linear.in_features, linear.out_features)
    folded.weight.data, folded.bias.data = (gate.view(-1, 1) * linear.weight).detach(), (gate.flatten() * linear.bias).detach()
    return folded


def _stacked(*linears: nn.Linear) -> nn.Linear:
    folded = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears))
    folded.weight.data = torch.cat([linear.weight for linear in linears]).detach()
    folded.bias.data = torch.cat([linear.bias for linear in linears]).detach()
    return folded


def _first_channels(linear: nn.Linear, patch_area: int, out_channels: int, channels: int) -> nn.Linear:
    """The rows of a patch projection that give the first `channels` of `out_channels`; a patch is laid out as (p, p, channel)."""
    folded = nn.Linear(linear.in_features, patch_area * channels)
    folded.weight.data = linear.weight.view(patch_area, out_channels, -1)[:, :channels].flatten(0, 1).detach()
    folded.bias.data = linear.bias.view(patch_area, out_channels)[:, :channels].flatten().detach()
    return folded
