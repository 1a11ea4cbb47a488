"""CLIP text encoders of Stable Diffusion and SDXL: 77 padded ids to token states, in SDXL to a pooled state too."""

import torch
from torch import Tensor, nn


class ClipTextEncoder(nn.Module):
    """ids (B, T) to states (B, T, D): the last hidden state of transformers' CLIPTextModel, after its final norm."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).last_hidden_state


class SdxlTextEncoder(nn.Module):
    """ids (B, T) to states (B, T, D1 + D2), both encoders' last but one hidden states, and pooled (B, P), the second's text_embeds.

    `model_1` is a CLIPTextModel, `model_2` a CLIPTextModelWithProjection. Both take the same ids, since their tokenizers differ only in the
    padding after the EOS token: `pads[0]` in `ids`, `pads[1]` for the second. (With a pad of "!", transformers' tokenizer takes a "!" in
    the prompt for padding too; the model was trained on the word, and gets it here.)
    """

    def __init__(self, model_1: nn.Module, model_2: nn.Module, eos: int, pads: tuple[int, int]):
        super().__init__()
        self.model_1, self.model_2, self.eos, self.pads = model_1, model_2, eos, pads

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        first = self.model_1(ids, output_hidden_states=True)
        second = self.model_2(self._padded_for_second(ids), output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    def _padded_for_second(self, ids: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device)
        last = (position * (ids != self.pads[0])).amax(1, keepdim=True)
        # If EOS is the pad too, the first one after the text is the EOS itself.
        return torch.where(position > last + int(self.eos == self.pads[0]), self.pads[1], ids)
