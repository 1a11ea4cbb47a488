"""The clamped CLIP loss (SwiftBrush v2, equation 5), for those who have the weights of a CLIP model."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import CaptionEncoder, Weights
from snoopi_rt.export.backbones.network import load_decoder
from snoopi_rt.export.text.rule import clip_rule
from snoopi_rt.export.training.losses.loss import Loss, Term
from snoopi_rt.export.training.pgsb import clamped_clip_loss
from snoopi_rt.export.training.prompt_files import read_prompts
from snoopi_rt.export.training.recipe import Clip, LossSettings, StudentRecipe
from snoopi_rt.export.training.run import Run, StudentBatch
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.training.text_states import encode_prompts, states_key
from snoopi_rt.export.weights.checkpoint import load_module, read_config
from snoopi_rt.export.weights.files import CONFIG
from snoopi_rt.files import check_folder

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pictures, by channel (Radford et al. 2021)."""


class ClipLoss(Loss):
    """How far the cosine of picture and prompt stays below a threshold, differentiable in the latent; its weight falls linearly to 0.

    The embeddings of all prompts are computed once and kept. The vae of the teacher's folder makes the pictures: a TAESD saves much memory.
    """

    Settings = Clip
    settings: Clip

    def __init__(self, run: Run, settings: Clip):
        super().__init__(run, settings)
        task, folder = run.task, run.task.clip
        assert folder is not None  # see `check`
        with run.prepared():
            self._clip = load_module(folder, CLIPModel).to(run.models.device)
            self._decoder = load_decoder(Weights(task.teacher)).to(run.models.device)
            texts, key = partial(read_prompts, task.prompts), states_key(task.prompts, folder)
            self._prompts = encode_prompts(texts, key, _text_embedder(folder, self._clip), masked=False, folder=task.states_folder("clip"))
        self._prompts.on(run.models.device, torch.float32)

    @classmethod
    def check(cls, settings: LossSettings, task: Task, recipe: StudentRecipe) -> None:
        if task.clip is not None:
            read_config(check_folder(task.clip) / CONFIG, CLIPModel)
        if settings.weight and not recipe.losses["vsd"].weight:
            raise InputError("the clamped CLIP loss needs a vsd.weight above 0")
        if (settings.weight > 0) != (task.clip is not None):
            raise InputError("the clamped CLIP loss needs both: a CLIP model and a clip.weight above 0")

    def weight(self, step: int) -> float:
        return super().weight(step) * (1 - step / self.run.recipe.steps)

    def term(self, batch: StudentBatch) -> Term:
        side = self._clip.config.vision_config.image_size
        pictures = nn.functional.interpolate(self._decoder.pixels(batch.x0), (side, side), mode="bicubic", antialias=True) / 2 + 0.5
        mean, deviation = (torch.tensor(statistic, device=batch.x0.device).view(1, 3, 1, 1) for statistic in (MEAN, DEVIATION))
        embedded = self._clip.visual_projection(self._clip.vision_model((pictures - mean) / deviation).pooler_output)
        texts = self._prompts.batch(batch.rows).states[:, 0]
        loss = clamped_clip_loss(nn.functional.cosine_similarity(embedded, texts), self.settings.threshold)
        return Term(batch.x0, loss, {"clip": loss})


def _text_embedder(folder: Path, model: nn.Module) -> CaptionEncoder:
    """An encoder that makes one state, its embedding (1, P), of a prompt."""

    @torch.no_grad()
    def encode(prompts: list[Tensor]) -> list[Tensor]:
        device = next(model.parameters()).device
        return [model.text_projection(model.text_model(ids.to(device)).pooler_output)[:, None].cpu() for ids in prompts]

    return CaptionEncoder(lambda path: clip_rule(folder, path, model.text_model.embeddings.token_embedding.num_embeddings), encode)
