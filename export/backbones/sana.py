"""SANA-Sprint with its timesteps and its guidance folded away and negative prompts in every cross-attention: the network that is exported.

As in PixArt every modulation is a constant at one timestep and one embedded guidance: scale and shift become LayerNorm's weight and bias,
gates go into the projection behind which they stand. `tests/export/test_sana.py` holds it against diffusers' own pipeline.
"""

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import silu

from snoopi_rt.errors import InputError
from snoopi_rt.export.attention import (
    GuidedAttention,
    Negative,
    NegativePrompt,
    OneProductAttention,
    both_prompts,
    linear_attention,
    merge_heads,
    split_heads,
)
from snoopi_rt.export.fold import gated, linear, modulated_norm
from snoopi_rt.export.guidance import Guidance
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.kernels import fused_attention

SUPPORTED = {"guidance_embeds": True, "patch_size": 1, "interpolation_scale": None, "norm_elementwise_affine": False}


def check_config(network: SanaTransformer2DModel) -> None:
    """Returns for a network of SANA-Sprint; raises InputError for another SANA."""
    for key, value in SUPPORTED.items():
        if network.config[key] != value:
            raise InputError(f"this SANA has {key} {network.config[key]!r}, which is not supported: SANA-Sprint has {value!r}")


class GuidedSana(nn.Module):
    """The student as diffusers computes it, with guidance: what the folded network and the exported graph are checked against.

    Takes and gives what FoldedSana does. Sets the processors of the cross-attentions of `network`, whose caption projection and norm are
    left out: they belong to the text encoder.
    """

    def __init__(
        self, network: SanaTransformer2DModel, rule: OneStepRule, guidance: Guidance, empty_states: Tensor, embedded_guidance: float
    ):
        super().__init__()
        self.network, self.rule = network, rule
        self.embedded = embedded_guidance * network.config.guidance_embeds_scale
        self.attention = _CrossAttention(guidance, empty_states, fused_attention)
        for block in network.transformer_blocks:
            block.attn2.set_processor(self.attention)

    def forward(
        self,
        noise: Tensor,
        prompt_states: Tensor,
        negative_states: Tensor | None = None,
        negative_scale: Tensor | None = None,
        renoise: Tensor | None = None,
    ) -> Tensor:
        self.attention.negative = None if negative_states is None else (negative_states, None, negative_scale)

        def network(step: int, latent: Tensor) -> Tensor:
            timestep, embedded = (torch.full((len(noise),), value) for value in (self.rule.steps[step].timestep, self.embedded))
            return self.network(latent, prompt_states, timestep=timestep, guidance=embedded, return_dict=False)[0]

        return self.rule.run(network, noise, renoise)


class _CrossAttention(GuidedAttention):
    """GuidedAttention whose negative is set on it: SANA's network passes none to its processors."""

    negative: tuple[Tensor, None, Tensor | None] | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative: NegativePrompt | None = None,
        **_: object,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, self.negative)


class FoldedSana(nn.Module):
    """`noise, prompt_states, negative_states, negative_scale, renoise -> latent`; see design of the graphs.

    noise (B, C, h, w); states (B, T, D) and (B, U, D) behind the caption projection and its norm; scale (B,); renoise (B, S - 1, C, h, w)
    for S steps; latent (B, C, h, w) fp32. A guidance of kind none takes no negative. `empty_states` (1, T0, D): the empty prompt, for
    guidance that measures from it. `embedded_guidance`: the guidance scale that the network was distilled to follow.
    """

    def __init__(
        self, network: SanaTransformer2DModel, rule: OneStepRule, guidance: Guidance, empty_states: Tensor, embedded_guidance: float
    ):
        super().__init__()
        check_config(network)
        self.rule = rule
        self.embed = linear(network.patch_embed.proj.weight.flatten(1), network.patch_embed.proj.bias)
        with torch.no_grad():
            self.steps = nn.ModuleList(
                FoldedTransformer(network, step.timestep, embedded_guidance, guidance, empty_states) for step in rule.steps
            )

    def forward(
        self,
        noise: Tensor,
        prompt_states: Tensor,
        negative_states: Tensor | None = None,
        negative_scale: Tensor | None = None,
        renoise: Tensor | None = None,
    ) -> Tensor:
        states, negative = both_prompts(prompt_states, negative_states, negative_scale)

        def network(step: int, latent: Tensor) -> Tensor:
            size = latent.shape[2:]
            prediction = self.steps[step](self.embed(latent.flatten(2).transpose(1, 2)), size, states, negative)
            return prediction.transpose(1, 2).unflatten(2, size)

        return self.rule.run(network, noise, renoise)


class FoldedTransformer(nn.Module):
    """Tokens (B, h * w, D) and text to tokens (B, h * w, C), at one timestep and one embedded guidance."""

    def __init__(
        self, network: SanaTransformer2DModel, timestep: float, embedded_guidance: float, guidance: Guidance, empty_states: Tensor
    ):
        super().__init__()
        fed = (torch.tensor([value]) for value in (timestep, embedded_guidance * network.config.guidance_embeds_scale))
        modulation, embedded = network.time_embed(*fed, hidden_dtype=torch.float32)
        self.blocks = nn.ModuleList(FoldedBlock(block, modulation, guidance, empty_states) for block in network.transformer_blocks)
        shift, scale = (network.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        self.norm, self.project = modulated_norm(network.norm_out.norm, scale, shift), network.proj_out

    def forward(self, hidden: Tensor, size: torch.Size, states: Tensor, negative: Negative | None) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden, size, states, negative)
        return self.project(self.norm(hidden))


class FoldedBlock(nn.Module):
    """One transformer block at one timestep: linear self-attention, guided cross-attention of what is not normed, gated convolutions."""

    def __init__(self, block: nn.Module, modulation: Tensor, guidance: Guidance, empty_states: Tensor):
        super().__init__()
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            block.scale_shift_table[None] + modulation.reshape(1, 6, -1)
        ).chunk(6, dim=1)
        self.norm1, self.own = modulated_norm(block.norm1, scale_msa, shift_msa), LinearAttention(block.attn1, gate_msa)
        self.cross = OneProductAttention(block.attn2, guidance, empty_states)
        self.norm2, self.convolve = modulated_norm(block.norm2, scale_mlp, shift_mlp), GatedConvolutions(block.ff, gate_mlp)

    def forward(self, hidden: Tensor, size: torch.Size, states: Tensor, negative: Negative | None) -> Tensor:
        hidden = hidden + self.own(self.norm1(hidden))
        hidden = hidden + self.cross(hidden, states, negative=negative)
        return hidden + self.convolve(self.norm2(hidden), size)


class LinearAttention(nn.Module):
    """Self-attention without a softmax, its gate in the output projection."""

    def __init__(self, attn: Attention, gate: Tensor):
        super().__init__()
        self.query, self.key, self.value, self.heads = attn.to_q, attn.to_k, attn.to_v, attn.heads
        self.norm_query, self.norm_key = attn.norm_q or nn.Identity(), attn.norm_k or nn.Identity()
        self.out = gated(attn.to_out[0], gate)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.norm_query(self.query(hidden)), self.norm_key(self.key(hidden)), self.value(hidden)
        return self.out(merge_heads(linear_attention(*(split_heads(x, self.heads) for x in (q, k, v)))))


class GatedConvolutions(nn.Module):
    """GLUMBConv: the 1x1 convolutions are products over tokens, the depthwise one is cut into its two halves, value and gate."""

    def __init__(self, ff: nn.Module, gate: Tensor):
        super().__init__()
        inverted, depth = ff.conv_inverted, ff.conv_depth
        self.widen = nn.ModuleList(
            linear(weight, bias) for weight, bias in zip(inverted.weight.flatten(1).chunk(2), inverted.bias.chunk(2), strict=True)
        )
        self.depth = nn.ModuleList(
            _depthwise(weight, bias) for weight, bias in zip(depth.weight.chunk(2), depth.bias.chunk(2), strict=True)
        )
        self.narrow = linear(gate.view(-1, 1) * ff.conv_point.weight.flatten(1), None)

    def forward(self, hidden: Tensor, size: torch.Size) -> Tensor:
        value, gate = (
            depth(silu(widen(hidden)).transpose(1, 2).unflatten(2, size)) for widen, depth in zip(self.widen, self.depth, strict=True)
        )
        return self.narrow((value * silu(gate)).flatten(2).transpose(1, 2))


def _depthwise(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(len(weight), len(weight), 3, padding=1, groups=len(weight), device="meta")
    conv.weight, conv.bias = (nn.Parameter(value.detach(), requires_grad=False) for value in (weight, bias))
    return conv
