"""The UNets of Stable Diffusion 1.5, 2.1 and XL with their timesteps folded away and guidance in every cross-attention.

At a known timestep the time embedding of a ResNet block is a constant: it becomes the bias of the convolution before it. A student of
several steps has one such bias per step and shares all weights. SDXL's embedding also depends on the prompt's pooled states; what it adds
to every block is computed once per call, in one product. `tests/export/test_unet.py` checks all of it against diffusers' own pipelines.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from snoopi_rt.errors import InputError
from snoopi_rt.export.attention import GuidedAttention, Negative, NegativePrompt, OneProductAttention, SelfAttention, both_prompts
from snoopi_rt.export.fold import linear, stacked
from snoopi_rt.export.guidance import Guidance
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.kernels import fused_attention

UNSUPPORTED = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "time_embedding_act_fn": None,
    "resnet_time_scale_shift": "default",
}


class GuidedUNet(nn.Module):
    """The student as diffusers computes it, with guidance: the reference of the folded network and the exported graph.

    Its inputs and output are FoldedUNet's. Sets the attention processors of `network`.
    """

    def __init__(
        self,
        network: UNet2DConditionModel,
        rule: OneStepRule,
        guidance: Guidance,
        empty_states: Tensor,
        time_ids: Tensor | None = None,
        embedded_guidance: float = 1.0,
    ):
        super().__init__()
        self.network, self.rule, self.time_ids = network, rule, time_ids
        self.condition = guidance_condition(network, embedded_guidance)
        network.set_attn_processor(GuidedAttention(guidance, empty_states, fused_attention))

    def forward(
        self,
        noise: Tensor,
        prompt_states: Tensor,
        negative_states: Tensor | None = None,
        negative_scale: Tensor | None = None,
        prompt_pooled: Tensor | None = None,
        renoise: Tensor | None = None,
    ) -> Tensor:
        negative = None if negative_states is None else (negative_states, None, negative_scale)
        added = (
            {}
            if prompt_pooled is None or self.time_ids is None
            else {"text_embeds": prompt_pooled, "time_ids": self.time_ids.expand(len(noise), -1)}
        )

        def network(step: int, latent: Tensor) -> Tensor:
            t = torch.full((len(noise),), self.rule.steps[step].timestep)
            return unet_prediction(self.network, latent, t, prompt_states, None, negative, added=added, condition=self.condition)

        return self.rule.run(network, noise, renoise)


def unet_prediction(
    network: UNet2DConditionModel,
    x_t: Tensor,
    t: Tensor,
    states: Tensor,
    mask: None,
    negative: NegativePrompt | None,
    size: tuple[int, int] | None = None,
    added: dict[str, Tensor] | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """The network's prediction for x_t (B, C, h, w); see Denoiser. `added`: SDXL's pooled states and image size, in place of `size`;
    `condition`: see guidance_condition."""
    return network(
        x_t,
        t,
        encoder_hidden_states=states,
        cross_attention_kwargs={"negative": negative},
        added_cond_kwargs=added or {},
        timestep_cond=condition,
        return_dict=False,
    )[0]


def guidance_condition(network: UNet2DConditionModel, scale: float) -> Tensor | None:
    """The input (1, D) by which a network that was distilled for it (LCM) follows a guidance scale; None for other networks."""
    if (width := network.config.time_cond_proj_dim) is None:
        return None
    embed: Any = StableDiffusionPipeline.get_guidance_scale_embedding  # which reads nothing of its pipeline
    return embed(None, torch.tensor([scale - 1]), embedding_dim=width)


@dataclass(frozen=True)
class Condition:
    """What a ResNet block gets in place of the time embedding."""

    step: int
    added: Tensor | None
    """For SDXL: what the prompt adds to the channels of all blocks, (B, sum C)."""


class FoldedUNet(nn.Module):
    """`noise, prompt_states, negative_states, negative_scale, prompt_pooled, renoise -> latent`; the graph `generator`.

    noise (B, C, h, w), sides multiples of 8; states (B, 77, D); scale (B,); pooled (B, P) for SDXL only; renoise (B, S - 1, C, h, w) for S
    steps; latent (B, C, h, w) fp32. `time_ids` (1, 6): SDXL's original size, crop and target size, height first. `embedded_guidance`: see
    guidance_condition.
    """

    def __init__(
        self,
        network: UNet2DConditionModel,
        rule: OneStepRule,
        guidance: Guidance,
        empty_states: Tensor,
        time_ids: Tensor | None = None,
        embedded_guidance: float = 1.0,
    ):
        super().__init__()
        check_config(network)
        self.rule = rule
        # New modules, the same tensors.
        self.network = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
        with torch.no_grad():
            condition = guidance_condition(network, embedded_guidance)
            timesteps = network.time_proj(torch.tensor([step.timestep for step in rule.steps]))
            embedded = torch.cat([network.time_embedding(t[None], condition) for t in timesteps])
        children = [(parent, name, child) for parent in list(self.network.modules()) for name, child in parent.named_children()]
        resnets = [(parent, name, child) for parent, name, child in children if isinstance(child, ResnetBlock2D)]
        ends = np.cumsum([block.conv1.out_channels for _, _, block in resnets])
        self.prompt_shift = None
        if network.config.addition_embed_type == "text_time":
            self.prompt_shift = PromptShift(self.network, [block.time_emb_proj for _, _, block in resnets], embedded, time_ids)
        for (parent, name, block), end in zip(resnets, ends, strict=True):
            columns = slice(end - block.conv1.out_channels, end) if self.prompt_shift else None
            setattr(parent, name, FoldedResnet(block, embedded, columns))
        for _, _, block in children:
            if isinstance(block, BasicTransformerBlock):
                block.attn1, block.attn2 = SelfAttention(block.attn1), OneProductAttention(block.attn2, guidance, empty_states)
                if isinstance(block.ff.net[0], GEGLU):
                    block.ff.net[0] = HalvedGEGLU(block.ff.net[0])
        self.network.time_embedding = self.network.add_embedding = None

    def forward(
        self,
        noise: Tensor,
        prompt_states: Tensor,
        negative_states: Tensor | None = None,
        negative_scale: Tensor | None = None,
        prompt_pooled: Tensor | None = None,
        renoise: Tensor | None = None,
    ) -> Tensor:
        states, negative = both_prompts(prompt_states, negative_states, negative_scale)

        def network(step: int, latent: Tensor) -> Tensor:
            return self._predict(latent, Condition(step, self.prompt_shift and self.prompt_shift(step, prompt_pooled)), states, negative)

        return self.rule.run(network, noise, renoise)

    def _predict(self, latent: Tensor, condition: Condition, states: Tensor, negative: Negative | None) -> Tensor:
        """UNet2DConditionModel.forward, without what one-step students do not have."""
        network = self.network
        text = {"encoder_hidden_states": states, "cross_attention_kwargs": {"negative": negative}}
        hidden = network.conv_in(latent)
        skips = [hidden]
        for block in network.down_blocks:
            hidden, more = block(hidden, temb=condition, **(text if hasattr(block, "attentions") else {}))
            skips += more
        if network.mid_block is not None:
            hidden = network.mid_block(hidden, condition, **(text if hasattr(network.mid_block, "has_cross_attention") else {}))
        for block in network.up_blocks:
            count = len(block.resnets)
            hidden = block(
                hidden_states=hidden,
                temb=condition,
                res_hidden_states_tuple=tuple(skips[-count:]),
                **(text if hasattr(block, "attentions") else {}),
            )
            del skips[-count:]
        return network.conv_out(network.conv_act(network.conv_norm_out(hidden)))


class FoldedResnet(nn.Module):
    """A ResNet block at known timesteps: its first convolution has one bias per step. `columns` of Condition.added, if any, are added."""

    def __init__(self, block: ResnetBlock2D, embedded: Tensor, columns: slice | None):
        super().__init__()
        self.norm1, self.norm2, self.conv2, self.shortcut = block.norm1, block.norm2, block.conv2, block.conv_shortcut
        self.columns, self.divisor = columns, block.output_scale_factor
        if columns is None:
            shifts = block.time_emb_proj(silu(embedded)).detach()
            self.conv1 = nn.ModuleList(_with_bias(block.conv1, block.conv1.bias + shift) for shift in shifts)
        else:
            self.conv1 = nn.ModuleList([block.conv1])

    def forward(self, hidden: Tensor, condition: Condition) -> Tensor:
        inner = silu(self.norm1(hidden))
        if self.columns is None or condition.added is None:
            inner = self.conv1[condition.step](inner)
        else:
            inner = self.conv1[0](inner) + condition.added[:, self.columns, None, None]
        inner = self.conv2(silu(self.norm2(inner)))
        return ((hidden if self.shortcut is None else self.shortcut(hidden)) + inner) / self.divisor


class HalvedGEGLU(nn.Module):
    """GEGLU as two products: splitting one product into halves copies it, which takes 2 % of SD 2.1's time on OpenVINO."""

    def __init__(self, both: GEGLU):
        super().__init__()
        weights, biases = both.proj.weight.chunk(2), both.proj.bias.chunk(2)
        self.value, self.gate = (linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.value(hidden) * gelu(self.gate(hidden))


class PromptShift(nn.Module):
    """What SDXL's pooled states (B, P), image size and timestep add to the channels of all ResNet blocks, (B, sum C), in one product."""

    def __init__(self, network: UNet2DConditionModel, projections: list[nn.Linear], embedded: Tensor, time_ids: Tensor):
        super().__init__()
        first = network.add_embedding.linear_1
        width = first.in_features - 6 * network.config.addition_time_embed_dim
        self.embedded, self.second = nn.Buffer(embedded), network.add_embedding.linear_2
        with torch.no_grad():
            of_size = network.add_time_proj(time_ids.flatten()).flatten()
            self.first = linear(first.weight[:, :width].clone(), first.bias + first.weight[:, width:] @ of_size)
            self.project = stacked(*projections)

    def forward(self, step: int, pooled: Tensor) -> Tensor:
        return self.project(silu(self.embedded[step] + self.second(silu(self.first(pooled)))))


def check_config(network: UNet2DConditionModel) -> None:
    """Returns for a UNet of Stable Diffusion 1.5, 2.1, XL or a pruned one; raises InputError for another kind of conditioning."""
    config = network.config
    for key, value in UNSUPPORTED.items():
        if config.get(key) != value:
            raise InputError(f"this UNet has {key} {config[key]!r}, which is not supported: known are those of SD 1.5, SD 2.1 and SDXL")
    if config.addition_embed_type not in (None, "text_time"):
        raise InputError(f"this UNet has addition_embed_type {config.addition_embed_type!r}, supported are none and 'text_time' (SDXL)")


def _with_bias(conv: nn.Conv2d, bias: Tensor) -> nn.Conv2d:
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, device="meta")
    folded.weight, folded.bias = conv.weight, nn.Parameter(bias.detach(), requires_grad=False)
    return folded
