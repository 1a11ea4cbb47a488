"""A pipeline inside an application: prepared prompts, many jobs, timeouts, cancelled calls, asyncio."""

import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from snoopi_rt import Cancelled, Conditioning, InputError, Request, Result
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.pipeline import Pipeline

JOBS = [
    "a cat",
    {"prompt": "a red fox", "negative_prompt": "blurry", "negative_scale": 0.5, "seed": 4},
    {"prompt": "a blue cat", "seed": 5},
    {"prompt": "a fox", "negative_prompt": "blurry", "seed": 6},
]


ROUND = ["a cat", "a red fox", "a blue cat", "a fox"]


@pytest.fixture
def slow(original: Bundle, fakes: dict[str, FakeEngine]) -> Pipeline:
    """Each stage takes a tenth of a second."""

    def slowed(engine: FakeEngine) -> FakeEngine:
        def run(**arrays: np.ndarray) -> dict[str, np.ndarray]:
            time.sleep(0.1)
            return engine(**arrays)

        return FakeEngine(run, engine.inputs, engine.outputs)

    made = {graph: slowed(engine) for graph, engine in fakes.items()}
    return Pipeline(original, made.__getitem__, "cpu", cache=Cache())


def test_a_prepared_prompt_draws_what_its_text_draws_without_being_looked_up(pipe: Pipeline, fakes: dict[str, FakeEngine]) -> None:
    expected = pipe.generate(["a red fox", "a cat"], "blurry", 0.5, seed=1)
    fox, blurry = pipe.prepare("a red fox"), pipe.prepare("blurry")
    assert isinstance(fox, Conditioning) and str(fox) == "a red fox"
    fakes["text_encoder"].close()  # from here on nothing can be encoded
    found = pipe.generate([fox, "a cat"], blurry, 0.5, seed=1)
    np.testing.assert_array_equal(found.images, expected.images)
    assert found.requests == expected.requests


def test_a_prompt_that_was_prepared_for_another_bundle_is_refused(pipe: Pipeline) -> None:
    foreign = Conditioning("a cat", pipe.prepare("a cat").states, "another")
    for words in ((foreign,), ("a cat", foreign), (["a cat", foreign],)):
        with pytest.raises(InputError, match="prompt 'a cat' was prepared for another bundle"):
            pipe.generate(*words)


def test_many_jobs_are_read_as_they_are_needed_and_drawn_together(pipe: Pipeline, fakes: dict[str, FakeEngine]) -> None:
    read = 0

    def jobs() -> Iterator:
        nonlocal read
        while True:
            for job in JOBS:
                read += 1
                yield job

    given = pipe.generate_many(jobs())
    first = next(given)
    assert read == pipe.max_batch and fakes["generator"].calls == 1 and len(first) == 1
    found = [first, *(next(given) for _ in range(6))]
    prompts = ["a cat", "a red fox", "a blue cat", "a fox", "a cat", "a red fox", "a blue cat"]
    assert [[request.prompt for request in result.requests] for result in found] == [[prompt] for prompt in prompts]
    alone = pipe.generate("a red fox", "blurry", 0.5, 4)
    np.testing.assert_array_equal(found[1].images, alone.images)
    assert found[1].requests == (Request("a red fox", "blurry", 0.5, 4),) and found[0].requests[0].negative_prompt is None


def test_a_wrong_job_is_an_error_when_it_is_reached(pipe: Pipeline) -> None:
    given = pipe.generate_many(["a cat", {"prompt": ""}, "a fox"])
    assert next(given).requests[0].prompt == "a cat"
    with pytest.raises(InputError, match="prompt is empty"):
        next(given)
    with pytest.raises(InputError, match="unknown 'colour' in a job, choose from prompt, negative_prompt, negative_scale, seed"):
        next(pipe.generate_many([{"prompt": "a cat", "colour": "red"}]))
    with pytest.raises(InputError, match=r"a job is one image, and \['a cat', 'a fox'\] is a list"):
        next(pipe.generate_many([{"prompt": ["a cat", "a fox"]}]))


def test_requests_draw_what_generate_draws_and_are_judged_alike(pipe: Pipeline) -> None:
    requests = pipe.check(["a red fox", "a cat"], ["blurry", None], 0.5, seed=[4, 7], n=2)
    result = pipe.run(requests)
    np.testing.assert_array_equal(result.images, pipe.generate(["a red fox", "a cat"], ["blurry", None], 0.5, seed=[4, 7], n=2).images)
    assert list(result.requests) == requests
    for wrong in (
        Request("", None, None, 1),
        Request("a cat", None, 0.5, 1),
        Request("a cat", "blurry", 9.0, 1),
        Request("a cat", None, None, -1),
    ):
        with pytest.raises(InputError):
            pipe.run([*requests, wrong])
    with pytest.raises(InputError, match="no request"):
        pipe.run([])


def test_of_groups_drawn_together_a_wrong_one_costs_the_others_nothing(pipe: Pipeline) -> None:
    cat, fox = pipe.check("a cat", seed=1), pipe.check("a fox", "blurry", seed=2, n=2)
    first, error, last = pipe.run_each([cat, [Request("a cat", None, None, -1)], fox])
    assert isinstance(error, InputError) and isinstance(first, Result) and isinstance(last, Result)
    assert first.requests == tuple(cat) and last.requests == tuple(fox)
    np.testing.assert_array_equal(last.images, pipe.run(fox).images)
    gone = threading.Event()
    gone.set()
    answers = list(pipe.run_each([cat, fox], cancel=[gone, gone]))
    assert all(isinstance(answer, Cancelled) for answer in answers)
    assert all(isinstance(answer, Result) for answer in pipe.run_each([cat, fox], cancel=[gone, threading.Event()]))


def test_a_panic_is_of_its_group_alone_and_nothing_is_drawn_ahead(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As native code raises it: no Exception."""

    run, calls = pipe.run, []

    def panics(requests: list[Request], *rest: object) -> Result:
        calls.append(len(requests))
        if any(request.prompt == "a fox" for request in requests):
            raise Panic
        return run(requests, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipe, "run", panics)
    results = pipe.run_each([pipe.check(prompt, seed=1) for prompt in ("a cat", "a fox", "a red fox")])
    assert isinstance(next(results), Result) and isinstance(next(results), Panic)
    assert calls == [3, 1, 1]
    assert isinstance(next(results), Result)
    with pytest.raises(StopIteration):
        next(results)


def test_a_part_of_a_result_is_a_result(pipe: Pipeline) -> None:
    result = pipe.generate(["a cat", "a red fox"], seed=3, n=2)
    np.testing.assert_array_equal(result[1:3].images, result.images[1:3])
    assert result[1:3].seeds == [4, 3] and result[-1].requests == result.requests[-1:]
    assert [one.seeds for one in result] == [[3], [4], [3], [4]]
    with pytest.raises(IndexError):
        result[4]


def test_no_stage_begins_after_the_timeout(slow: Pipeline) -> None:
    with pytest.raises(Cancelled, match=r"^the timeout of 0.05 s expired before generator$"):
        slow.generate("a cat", timeout=0.05)
    with pytest.raises(Cancelled, match=r"^the timeout of 0.05 s expired before decoder$"):
        slow.generate("a cat", timeout=0.05)  # the prompt is known by now
    assert len(slow.generate("a cat", timeout=30).images) == 1


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_timeout_that_is_none_is_refused(pipe: Pipeline, timeout: object) -> None:
    with pytest.raises(InputError, match="timeout must be a positive number of seconds"):
        pipe.generate("a cat", timeout=timeout)  # type: ignore[arg-type]


def test_a_call_that_nobody_waits_for_stops_before_its_next_stage(slow: Pipeline, fakes: dict[str, FakeEngine]) -> None:
    cancel = threading.Event()
    threading.Timer(0.15, cancel.set).start()
    with pytest.raises(Cancelled, match=r"^cancelled before decoder$"):
        slow.generate("a cat", cancel=cancel)
    assert fakes["decoder"].calls == 0


def test_asyncio_has_the_same_call(slow: Pipeline, fakes: dict[str, FakeEngine]) -> None:
    async def work() -> None:
        both = await asyncio.gather(slow.generate_async("a cat", seed=1), slow.generate_async("a fox", "blurry", seed=2))
        np.testing.assert_array_equal(both[0].images, slow.generate("a cat", seed=1).images)
        np.testing.assert_array_equal(both[1].images, slow.generate("a fox", "blurry", seed=2).images)
        decoded = fakes["decoder"].calls
        shared = SimpleNamespace(is_set=lambda: False)  # nothing else of an event is asked for: one task cancels no other's calls
        task = asyncio.create_task(slow.generate_async("a red cat", cancel=shared))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.4)
        assert fakes["decoder"].calls == decoded
        with pytest.raises(Cancelled):
            await slow.generate_async("a cat", cancel=SimpleNamespace(is_set=lambda: True))

    asyncio.run(work())
