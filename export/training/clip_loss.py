"""The clamped CLIP loss (SwiftBrush v2, equation 5), for those who have the weights of a CLIP model."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from snoopi_rt.export.backbones import PromptEncoder, Weights
from snoopi_rt.export.backbones.network import load_decoder
from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.text.rule import clip_rule
from snoopi_rt.export.training.pgsb import clamped_clip_loss
from snoopi_rt.export.training.prompt_files import read_prompts
from snoopi_rt.export.training.text_states import encode_prompts, states_key
from snoopi_rt.export.weights.checkpoint import load_module

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pictures, by channel (Radford et al. 2021)."""


class ClipJudge:
    """How well pictures fit their prompts: the cosine of a CLIPModel's two embeddings, differentiable in the latent.

    The embeddings of all prompts are computed once into the folder `states`. Pictures are made by the vae of the teacher's folder, where a
    TAESD saves much memory.
    """

    def __init__(self, preset: Preset, teacher: Path, clip: Path, prompts: Path, states: Path, device: torch.device):
        from transformers import CLIPModel

        self.model = load_module(clip, CLIPModel).to(device)
        self.decoder = load_decoder(Weights(teacher), preset).to(device)
        self.texts = encode_prompts(
            partial(read_prompts, prompts), states_key(prompts, clip), _text_embedder(clip, self.model), masked=False, folder=states
        )

    def loss(self, x0: Tensor, rows: list[int], threshold: float) -> Tensor:
        """A scalar of clean latents (B, C, h, w) fp32 of the prompts in `rows`."""
        side = self.model.config.vision_config.image_size
        pictures = nn.functional.interpolate(self.decoder.pixels(x0), (side, side), mode="bicubic", antialias=True) / 2 + 0.5
        mean, deviation = (torch.tensor(each, device=x0.device).view(1, 3, 1, 1) for each in (MEAN, DEVIATION))
        seen = self.model.visual_projection(self.model.vision_model((pictures - mean) / deviation).pooler_output)
        said = self.texts.batch(rows).to(x0.device, x0.dtype).states[:, 0]
        return clamped_clip_loss(nn.functional.cosine_similarity(seen, said), threshold)


def _text_embedder(clip: Path, model: nn.Module) -> PromptEncoder:
    """A prompt to one state, its embedding (1, P)."""

    @torch.no_grad()
    def encode(prompts: list[Tensor]) -> list[Tensor]:
        device = next(model.parameters()).device
        return [model.text_projection(model.text_model(ids.to(device)).pooler_output)[:, None].cpu() for ids in prompts]

    return PromptEncoder(lambda path: clip_rule(clip, path, model.text_model.embeddings.token_embedding.num_embeddings), encode)
