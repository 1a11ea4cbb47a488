"""Tiny teachers of every backbone."""

from pathlib import Path

import pytest
import tiny_students


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a few thousand random weights for each backbone, and files of prompts and negatives beside them."""
    root = tmp_path_factory.mktemp("teachers")
    tiny_students.pixart(root / "pixart", tiny_vae=True)
    tiny_students.stable_diffusion(root / "sd15", "sd15", tiny_vae=True)
    tiny_students.stable_diffusion(root / "sd21", "sd21", tiny_vae=True, prediction="v_prediction")
    (root / "prompts.txt").write_text("".join(f"{sentence}\n" for sentence in tiny_students.SENTENCES))
    (root / "negatives.txt").write_text("fog\na blue moon\n")
    return root
