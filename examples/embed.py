"""snoopi-rt inside an application: load once, draw often, change the negative scale on the fly.

python examples/embed.py
"""

import snoopi_rt

with snoopi_rt.load(threads=2) as pipe:
    pipe.warmup()

    # One call, one image; the result says what made it and how long each stage took.
    result = pipe.generate("a red apple on a white background", seed=7)
    print(result.images.shape, result.seeds, {stage: f"{seconds * 1e3:.1f} ms" for stage, seconds in result.timings.items()})

    # The same seed under four scales of one negative prompt, as one batch.
    scales = [0.0, 0.25, 0.5, 1.0]
    prompts = ["a blurry fox on a blue background"] * len(scales)
    batch = pipe.generate(prompts, "blurry", scales, seed=3)
    for picture, scale in zip(batch.pil(), scales, strict=True):
        print(f"scale {scale}: {picture.size[0]}x{picture.size[1]}, total {batch.timings['total'] * 1e3:.1f} ms for the batch")
