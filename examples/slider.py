"""A desktop program's loop: a slider moves, and the image of one seed follows. The newest value is drawn, off the window's thread.

python examples/slider.py
"""

import threading
import time

import snoopi_rt


class Preview:
    """Draws the newest scale. A drawing that has started is always shown: a slider that never rests would show nothing otherwise."""

    def __init__(self, pipe: snoopi_rt.Pipeline, prompt: str, negative: str, seed: int) -> None:
        # Encoded once: moving the slider encodes nothing.
        self.prompt, self.negative = pipe.prepare(prompt), pipe.prepare(negative)
        self.pipe, self.seed = pipe, seed
        self.newest: float | None = None
        self.moved, self.closed = threading.Condition(), False
        self.drawn: list[tuple[float, float]] = []
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def move(self, scale: float) -> None:
        """What the window calls: returns at once."""
        with self.moved:
            self.newest = scale
            self.moved.notify()

    def close(self) -> None:
        """Draws the newest scale, then ends."""
        with self.moved:
            self.closed = True
            self.moved.notify()
        self.thread.join()

    def work(self) -> None:
        while True:
            with self.moved:
                while self.newest is None and not self.closed:
                    self.moved.wait()
                if self.newest is None:
                    return
                scale, self.newest = self.newest, None
            result = self.pipe.generate(self.prompt, self.negative, scale, self.seed)
            # Here a program would hand result.images[0] to its window.
            self.drawn.append((scale, result.timings["total"]))


with snoopi_rt.load(threads=2) as pipe:
    pipe.warmup()
    preview = Preview(pipe, "a blurry panda on an orange background", "blurry", seed=9)
    moves = [step / 50 for step in range(51)]
    for scale in moves:
        preview.move(scale)
        time.sleep(0.004)  # a hand on a slider
    preview.close()
    scales = [scale for scale, _ in preview.drawn]
    each = 1e3 * sum(seconds for _, seconds in preview.drawn) / len(scales)
    print(f"{len(moves)} moves, {len(scales)} images, {each:.1f} ms each, the last at {scales[-1]}")
    assert scales[-1] == moves[-1] and scales == sorted(scales)
