"""Prompt, negative prompt and seed to images: tokenize, text encoder, noise, generator, decoder.

Knows no formula, no backbone and no engine package: it feeds the inputs that the bundle's graphs list.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from snoopi_rt.bundle.bundle import GRAPHS, Bundle
from snoopi_rt.bundle.tokenizer import PromptTooLong
from snoopi_rt.cache import Cache
from snoopi_rt.engines.base import Engine
from snoopi_rt.errors import Cancelled, InputError
from snoopi_rt.prompt_encoder import Conditioning, PromptEncoder, States
from snoopi_rt.request import FIELDS, Request, image_size, parse_requests, prompt_text, shown
from snoopi_rt.result import Result
from snoopi_rt.runtime.deadline import AllSet, AnySet, Deadline, Event
from snoopi_rt.runtime.image_stages import ImageStages, timed
from snoopi_rt.runtime.precision import format_precision, runs_on, select_variants
from snoopi_rt.runtime.vocabulary import Matcher

EMBEDDED = Path(__file__).parent / "bundles" / "small"
CLOSING = 60.0
"""Seconds that closing a pipeline waits for stages that run."""


class Pipeline:
    """A bundle on an engine. Many threads may call one pipeline; `snoopi_rt.load` makes it.

    `open_engine` opens a graph. With `low_memory` the text encoder and the other two are never open at once: each is opened when its turn
    comes, and one call runs at a time.
    """

    def __init__(
        self,
        bundle: Bundle,
        open_engine: Callable[[str], Engine],
        engine: str,
        precision: str | Mapping[str, str] | None = None,
        cache: Cache | None = None,
        low_memory: bool = False,
    ) -> None:
        variants = select_variants(bundle, engine, precision)
        self.bundle, self.engine, self.precision = bundle, engine, format_precision(variants)
        self._low_memory = low_memory
        self._turn: AbstractContextManager[Any] = threading.Lock() if low_memory else nullcontext()

        def open_image_stage(graph: str) -> Engine:
            if low_memory:
                self._prompts.release()
            return open_engine(graph)

        def open_text_encoder() -> Engine:
            if low_memory:
                self._stages.release()
            return open_engine("text_encoder")

        self._stages = ImageStages(bundle, variants, engine, open_image_stage)
        self.max_batch = self._stages.max_batch

        text, cache = variants.get("text_encoder"), Cache() if cache is None else cache
        self._prompts = PromptEncoder(bundle, text, open_text_encoder, cache, "" if text is None else runs_on(text, engine))
        self._matcher = None if bundle.vocabulary is None else Matcher(bundle.vocabulary)
        if not low_memory:
            self._stages.open()

    def __repr__(self) -> str:
        return f"<Pipeline: {self.bundle.name!r} on {self.engine}, {self.precision}, up to {self.max_batch} images at once>"

    @property
    def provider(self) -> str:
        """What generator and decoder really run on, as the engine's package calls it."""
        with self._turn:
            return self._stages.provider

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
        negative_scale: float | Sequence[float | None] | None = None,
        seed: int | Sequence[int | None] | None = None,
        n: int = 1,
        size: Sequence[int] | None = None,
        truncate: bool = False,
        timeout: float | None = None,
        cancel: Event | None = None,
    ) -> Result:
        """The n images of each prompt, prompt by prompt; image i of a prompt uses seed + i, and without a seed a random one.

        Prompt, negative, scale and seed may be lists of one length; a prompt may be what `prepare` returned. `size`, `truncate`, `timeout`
        and `cancel`: see `run`, which raises for the same reasons.
        """
        requests = parse_requests(prompt, negative_prompt, negative_scale, seed, n, self.bundle.guidance)
        return self.run(requests, size, truncate, timeout, cancel)

    __call__ = generate

    def run(
        self,
        requests: Sequence[Request],
        size: Sequence[int] | None = None,
        truncate: bool = False,
        timeout: float | None = None,
        cancel: Event | None = None,
    ) -> Result:
        """One image per request, in order; `generate`, batches and the server are built on it.

        `size` is (height, width), by default the bundle's first; `truncate` cuts prompts that are too long. After `timeout` seconds, or
        once `cancel` is set, no further stage begins.
        Raises InputError for requests that this bundle cannot draw, OutputError if a stage gives NaN, infinity or an image of one
        value, and Cancelled.
        """
        start, deadline = time.perf_counter(), Deadline(timeout, cancel)
        requests = [self._checked(request) for request in requests]
        if not requests:
            raise InputError("no request: say what to draw")
        size = image_size(size, self.bundle.sizes)
        timings = dict.fromkeys(GRAPHS, 0.0)
        with self._turn:
            states = self._encode(requests, truncate, timings, deadline)
            images = self._stages.draw(requests, states, size, timings, deadline)
            provider = self._stages.provider
        timings["total"] = time.perf_counter() - start
        return Result(
            images=images,
            requests=tuple(requests),
            timings=timings,
            engine=self.engine,
            provider=provider,
            precision=self.precision,
            bundle=self.bundle.name,
            bundle_hash=self.bundle.hash,
            truncate=truncate,
            warned={prompt: line for prompt in dict.fromkeys(request.prompt for request in requests) if (line := self.warning(prompt))},
        )

    def run_each(
        self,
        groups: Sequence[Sequence[Request]],
        size: Sequence[int] | None = None,
        truncate: bool = False,
        timeout: float | None = None,
        cancel: Sequence[Event] | None = None,
    ) -> Iterator[Result | BaseException]:
        """A Result per group, or why it could not be drawn: all in one call of `run`, and if that fails each group by itself, when its
        turn comes.

        `cancel`: an event per group; a call ends early when the events of all its groups are set.
        """
        events = [] if cancel is None else list(cancel)
        requests = [request for group in groups for request in group]
        try:
            together = self.run(requests, size, truncate, timeout, AllSet(events) if events else None)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # panics of native code are no Exceptions
            failure = error
        else:
            ends = accumulate(map(len, groups))
            yield from (together[end - len(group) : end] for group, end in zip(groups, ends, strict=True))
            return
        if len(groups) == 1 or isinstance(failure, Cancelled):
            yield from [failure] * len(groups)
            return
        for i, group in enumerate(groups):
            yield from self.run_each([group], size, truncate, timeout, events[i : i + 1] or None)

    async def generate_async(self, *arguments: Any, cancel: Event | None = None, **named: Any) -> Result:
        """What `generate` returns, drawn in a thread; when the task is cancelled, no further stage begins."""
        import asyncio  # not at the top: it is a tenth of a cold start's imports

        task_cancelled = threading.Event()  # its own: other calls may share the caller's
        named["cancel"] = AnySet([task_cancelled] if cancel is None else [task_cancelled, cancel])
        try:
            return await asyncio.to_thread(self.generate, *arguments, **named)
        except asyncio.CancelledError:
            task_cancelled.set()
            raise

    def generate_many(
        self,
        jobs: Iterable[str | Mapping[str, Any]],
        size: Sequence[int] | None = None,
        truncate: bool = False,
        timeout: float | None = None,
        cancel: Event | None = None,
    ) -> Iterator[Result]:
        """One result per job, in order, as many drawn at once as the bundle takes; jobs are read as they are needed.

        A job is a prompt, or prompt, negative_prompt, negative_scale and seed by name. The rest is as in `run`, for each call of it.
        Raises what `run` raises, when it reaches the wrong job: the results before that come first.
        """
        waiting = iter(jobs)
        while batch := list(islice(waiting, self.max_batch)):
            groups: list[list[Request]] = []
            wrong: Exception | None = None
            for job in batch:
                try:
                    groups.append(self._job(job))
                except InputError as error:
                    wrong = error
                    break
            events = None if cancel is None else [cancel] * len(groups)
            for result in self.run_each(groups, size, truncate, timeout, events) if groups else []:
                if isinstance(result, BaseException):
                    raise result
                yield result
            if wrong is not None:
                raise wrong

    def check(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
        negative_scale: float | Sequence[float | None] | None = None,
        seed: int | Sequence[int | None] | None = None,
        n: int = 1,
        size: Sequence[int] | None = None,
        truncate: bool = False,
    ) -> list[Request]:
        """The requests that `generate` would run, without drawing them. Raises InputError for what cannot be drawn."""
        requests = parse_requests(prompt, negative_prompt, negative_scale, seed, n, self.bundle.guidance)
        image_size(size, self.bundle.sizes)
        for text in _texts(map(self._checked, requests)):
            if not isinstance(text, Conditioning):
                with _naming(text, requests):
                    self._prompts.check(text, truncate)
        return requests

    def warning(self, prompt: str) -> str | None:
        """A line about a prompt with an object, number or colour that is not in the bundle's vocabulary; else None."""
        if self._matcher is None:
            return None
        return self._matcher.warning(prompt, "the embedded model" if self.bundle.folder == EMBEDDED else f"model {self.bundle.name!r}")

    def prepare(self, prompt: str, truncate: bool = False) -> Conditioning:
        """The prompt with its states, for any number of calls: nothing of it is computed or looked up again.

        Raises InputError for an invalid prompt, OutputError if the text encoder gives NaN.
        """
        with self._turn:
            return Conditioning(prompt_text(prompt), self._prompts.encode(prompt, truncate), self.bundle.hash)

    def keep(self, prompt: str, truncate: bool = False) -> bool:
        """Stores the prompt's states on disk, for this and later processes; returns whether they had to be computed.

        Raises InputError for an invalid prompt, OutputError if the states cannot be written to the cache folder.
        """
        with self._turn:
            return self._prompts.keep(prompt_text(prompt), truncate)

    def open(self) -> Self:
        """Opens all graphs and reads everything else in the bundle now, not when it is first needed; returns the pipeline.

        With weights "memory" the bundle's files are then no longer needed, unless `low_memory` opens graphs again and again. Raises
        BundleError, also if they have changed meanwhile.
        """
        with self._turn:
            self._prompts.open()
            self._stages.open()
        self.bundle.check()
        return self

    def warmup(self) -> Self:
        """Opens and runs all stages once, so that the next image takes its usual time; returns the pipeline."""
        known = self.bundle.prompts.texts if self.bundle.prompts and "text_encoder" not in self.bundle.graphs else ("warm",)
        self.generate(known[0], seed=0)
        return self

    def close(self) -> None:
        """Frees the engines when the stages that other threads are running have ended; waits up to CLOSING seconds for them.

        Any later call, and any further stage of those calls, raises EngineError.
        """
        parts, end = (self._prompts, self._stages.generator, self._stages.decoder), time.monotonic() + CLOSING
        for part in parts:
            part.stop()
        for part in parts:
            part.close(max(0.0, end - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _job(self, job: str | Mapping[str, Any]) -> list[Request]:
        """A job of `generate_many` as its one request."""
        row = dict(job) if isinstance(job, Mapping) else {"prompt": job}
        if unknown := row.keys() - set(FIELDS):
            raise InputError(f"unknown {min(unknown)!r} in a job, choose from {', '.join(FIELDS)}")
        values = {name: row.get(name) for name in FIELDS}
        if wrong := next((value for value in values.values() if isinstance(value, list | tuple)), None):
            raise InputError(f"a job is one image, and {shown(wrong)} is a list")
        return parse_requests(**values, n=1, guidance=self.bundle.guidance)

    def _checked(self, request: Request) -> Request:
        """The request as this bundle can draw it. Raises InputError."""
        request = request.checked(self.bundle.guidance)
        for text in request.texts:
            if isinstance(text, Conditioning) and text.bundle_hash != self.bundle.hash:
                raise InputError(f"prompt {str(text)!r} was prepared for another bundle")
        return request

    def _encode(self, requests: Sequence[Request], truncate: bool, timings: dict[str, float], deadline: Deadline) -> dict[str, States]:
        """The states of all prompts and negative prompts."""
        with timed(timings, "text_encoder"):
            try:
                states: dict[str, States] = {}
                for text in _texts(requests):
                    if isinstance(text, Conditioning):
                        states[text] = text.states
                        continue
                    deadline.check("text_encoder")
                    with _naming(text, requests):
                        states[text] = self._prompts.encode(text, truncate)
                return states
            finally:
                if self._low_memory:
                    self._prompts.release()


@contextmanager
def _naming(text: str, requests: Sequence[Request]) -> Iterator[None]:
    """Lets a PromptTooLong say which of the requests' texts it is about."""
    try:
        yield
    except PromptTooLong as error:
        kind = "prompt" if any(text == request.prompt for request in requests) else "negative prompt"
        error.text = kind if len({tuple(request.texts) for request in requests}) == 1 else f"{kind} {shown(text)}"
        raise


def _texts(requests: Iterable[Request]) -> list[str]:
    """Every prompt and negative prompt once, prepared ones first: an equal text needs no text encoder."""
    texts = [text for request in requests for text in request.texts]
    return list(dict.fromkeys(sorted(texts, key=lambda text: not isinstance(text, Conditioning))))
