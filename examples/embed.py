"""snoopi-rt inside an application: load once, draw from several threads, each call with a deadline and its errors handled.

python examples/embed.py
"""

from concurrent.futures import ThreadPoolExecutor

import snoopi_rt


def draw(prompt: str, seconds: float) -> str:
    """One job of a service: the image that a client gets, or why there is none."""
    try:
        result = pipe.generate(prompt, seed=7, timeout=seconds)
    except snoopi_rt.InputError as error:
        return f"wrong request: {error}"
    except snoopi_rt.Cancelled as error:
        return f"too late: {error}"
    except snoopi_rt.SnoopiError as error:  # a broken bundle or engine
        return f"cannot draw: {error}"
    height, width = result.images.shape[1:3]
    return f"{prompt}: {width}x{height}, {', '.join(f'{stage} {took * 1e3:.1f} ms' for stage, took in result.timings.items())}"


with snoopi_rt.load(threads=2) as pipe:
    pipe.warmup()

    # The same seed under four scales of one negative prompt, as one batch.
    scales = [0.0, 0.25, 0.5, 1.0]
    batch = pipe.generate(["a blurry fox on a blue background"] * len(scales), "blurry", scales, seed=3)
    print(f"{len(batch)} scales of seed {batch.seeds[0]}: {batch.timings['total'] * 1e3:.1f} ms")

    # Many threads may share the pipeline; the last two jobs fail.
    jobs = [("a red apple on a white background", 10), ("a panda on a green background", 10), ("", 10), ("a fox", 1e-6)]
    with ThreadPoolExecutor(4) as threads:
        for line in threads.map(draw, *zip(*jobs, strict=True)):
            print(line)
