"""The images of the tiny bundle by the definition, in numpy."""

from collections.abc import Callable

import numpy as np

Functions = dict[str, Callable[..., dict[str, np.ndarray]]]
IDS = {"a red fox": [0, 3, 4, 6, 1], "a cat": [0, 3, 7, 1], "blurry": [0, 8, 1]}


def expected(
    functions: Functions, prompt: str, negative: str | None, scale: float, seed: int, height: int = 16, width: int = 16
) -> np.ndarray:
    """One image by the definition: no batch, no padding, no cache."""

    def states(text: str) -> np.ndarray:
        return functions["text_encoder"](np.array([IDS[text]]))["states"]

    against = np.zeros((1, 1, 4), np.float32) if negative is None else states(negative)
    noise = np.random.RandomState(seed).standard_normal((4, height // 2, width // 2)).astype(np.float32)
    latent = functions["generator"](
        noise=noise[None],
        prompt_states=states(prompt),
        prompt_mask=np.ones((1, states(prompt).shape[1]), bool),
        negative_states=against,
        negative_mask=np.ones((1, against.shape[1]), bool),
        negative_scale=np.array([scale], np.float32),
    )["latent"]
    return functions["decoder"](latent)["image"][0]
