"""One seed of a one-step pipeline of diffusers while the scale of its negative prompt rises, side by side in one image.

python examples/diffusers_pipeline.py stabilityai/sd-turbo "a cat in a garden" flowers
"""

import sys

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from snoopi_rt.diffusers import with_negative

model, prompt, negative = sys.argv[1:]
cuda = torch.cuda.is_available()
pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16 if cuda else torch.float32).to("cuda" if cuda else "cpu")
pipe = with_negative(pipe)
images = [
    pipe(
        prompt,
        negative_prompt=negative,
        negative_scale=scale,
        guidance_scale=0,  # classifier-free guidance would call the network twice
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    for scale in (0, 0.2, 0.5, 1)
]
make_image_grid(images, rows=1, cols=len(images)).save("negative.png")
