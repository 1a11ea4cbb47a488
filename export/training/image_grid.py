"""Pictures with their captions in a grid, to look at."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def image_grid(pictures: np.ndarray, captions: list[str], columns: int = 8) -> Image.Image:
    """A grid of pictures (N, H, W, 3) uint8, each with its caption below."""
    font = ImageFont.load_default(size=10)
    cell, label = pictures.shape[1], 26
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (cell + 6), rows * (cell + label + 4)), "white")
    pen = ImageDraw.Draw(grid)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * (cell + 6) + 3, i // columns * (cell + label + 4) + 2
        grid.paste(Image.fromarray(np.asarray(picture)), (x, y))
        lines = [""]
        for word in caption.split():
            if font.getlength(f"{lines[-1]} {word}") > cell:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((x, y + cell + 1), "\n".join(lines[:2]), fill="black", font=font, spacing=1)
    return grid
