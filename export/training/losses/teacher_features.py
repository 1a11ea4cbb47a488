"""What the frozen teacher sees in latents: the outputs of some of its layers, by which pictures are compared and judged."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from snoopi_rt.export.training.models import Models
from snoopi_rt.export.training.text_states import TextBatch


class TeacherFeatures:
    """The outputs of the frozen teacher's layers at three depths of a transformer, or in the middle of a UNet."""

    def __init__(self, models: Models):
        self._models = models
        network = models.teachers.network
        blocks = getattr(network, "transformer_blocks", None)
        self._layers = [network.mid_block] if blocks is None else [blocks[len(blocks) * part // 4] for part in (1, 2, 3)]

    def __call__(self, latents: Tensor, noise: Tensor, t: Tensor, text: TextBatch) -> list[Tensor]:
        """Tokens (B, N, D) of each layer for clean latents (B, C, h, w), noised to t (B,); gradients flow to the latents."""
        models = self._models
        x_t = models.schedule.noised(latents, noise, t)
        with self._outputs() as maps, models.teachers.without_adapters() as network:
            # Never the compiled call, which would not see hooks.
            models.denoiser.predict(network, x_t.to(models.dtype), t, text.states, text.mask, None)
        return [features.flatten(2).transpose(1, 2) if features.ndim == 4 else features for features in maps]

    @contextmanager
    def _outputs(self) -> Iterator[list[Tensor]]:
        """The layers' outputs in the calls inside."""
        maps: list[Tensor] = []
        hooks: list = [layer.register_forward_hook(lambda _, __, output: maps.append(output)) for layer in self._layers]
        try:
            yield maps
        finally:
            for hook in hooks:
                hook.remove()


def feature_distance(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """The mean over layers of the mean squared distance (B,) of tokens scaled to length 1, 0 to 4: LPIPS (Zhang et al. 2018) unweighted."""
    distances = [
        (nn.functional.normalize(a.float(), dim=-1) - nn.functional.normalize(b.float(), dim=-1)).square().sum(-1).mean(1)
        for a, b in zip(first, second, strict=True)
    ]
    return sum(distances, start=distances[0].new_zeros(())) / len(distances)
