"""Requests that wait are drawn together, are let go, or leave the queue with their client."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from snoopi_rt.pipeline import Pipeline

pytest.importorskip("fastapi", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx")
from serving import DRAW, Slow, eventually, pictures, served  # noqa: E402

from snoopi_rt.server.settings import Settings  # noqa: E402


def test_what_waits_is_drawn_together(slow: Slow, pipe: Pipeline) -> None:
    expected = pipe.generate(["a cat"] * 6, seed=list(range(6))).images
    with served(Settings({"tiny": slow.open})) as address, ThreadPoolExecutor(8) as threads:
        first = threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat", "seed": 0}, timeout=30)
        eventually(lambda: slow.calls)
        rest = [threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat", "seed": seed}, timeout=30) for seed in range(1, 6)]
        eventually(lambda: 'waiting_images{model="tiny"} 5.0' in httpx.get(f"{address}/metrics").text)
        slow.go.set()
        answers = [each.result() for each in (first, *rest)]
        assert 'stage_seconds_count{model="tiny",stage="generator"} 3.0' in httpx.get(f"{address}/metrics").text  # once per call
    assert slow.calls == [1, 4, 1]  # as many as the bundle draws at once
    np.testing.assert_array_equal(np.concatenate([pictures(answer.json()) for answer in answers]), expected)


def test_without_batching_each_is_drawn_alone(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open}, max_batch=1)) as address, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=30) for _ in range(4)]
        eventually(lambda: 'waiting_images{model="tiny"} 3.0' in httpx.get(f"{address}/metrics").text)
        slow.go.set()
        assert all(each.result().status_code == 200 for each in asked)
    assert slow.calls == [1, 1, 1, 1]


def test_a_full_queue_says_when_to_come_back(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open}, queue=2)) as address, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=30)]
        eventually(lambda: slow.calls)
        asked += [threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=30) for _ in range(2)]
        eventually(lambda: 'waiting_images{model="tiny"} 2.0' in httpx.get(f"{address}/metrics").text)
        answer = httpx.post(address + DRAW, json={"prompt": "a cat"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        slow.go.set()
        assert all(each.result().status_code == 200 for each in asked)


def test_a_request_that_takes_too_long_is_let_go(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open}, timeout=0.3)) as address:
        answer = httpx.post(address + DRAW, json={"prompt": "a cat"})
        assert answer.status_code == 504 and "no image within 0.3 s" in answer.text
        slow.go.set()


def test_what_was_given_up_is_not_drawn_further_and_takes_nobodys_place(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open}, queue=2, max_batch=1)) as address, ThreadPoolExecutor(8) as threads:
        first = threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=0.5)
        eventually(lambda: slow.calls)
        others = [threads.submit(httpx.post, address + DRAW, json={"prompt": "a fox"}, timeout=0.5) for _ in range(2)]
        for each in (first, *others):
            assert isinstance(each.exception(), httpx.ReadTimeout)
        last = threads.submit(httpx.post, address + DRAW, json={"prompt": "a red fox"}, timeout=30)
        time.sleep(0.3)
        assert not last.done()  # not 429: nobody is before it any more
        slow.go.set()
        assert last.result().status_code == 200 and slow.calls == [1, 1]


def test_a_client_that_goes_leaves_the_queue(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open})) as address, ThreadPoolExecutor(4) as threads:
        first = threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=30)
        eventually(lambda: slow.calls)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + DRAW, json={"prompt": "a fox", "n": 3}, timeout=0.3)
        eventually(lambda: 'code="499"' in httpx.get(f"{address}/metrics").text)
        slow.go.set()
        assert first.result().status_code == 200
        assert httpx.post(address + DRAW, json={"prompt": "a cat"}).status_code == 200
    assert slow.calls == [1, 1]


def test_a_client_that_goes_is_noticed_though_it_sent_more_requests(slow: Slow) -> None:
    with served(Settings({"tiny": slow.open})) as address, ThreadPoolExecutor(4) as threads:
        first = threads.submit(httpx.post, address + DRAW, json={"prompt": "a cat"}, timeout=30)
        eventually(lambda: slow.calls)
        body = b'{"prompt": "a red fox"}'
        head = f"POST {DRAW} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
            client.sendall(head.encode() + body + b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            eventually(lambda: 'waiting_images{model="tiny"} 1.0' in httpx.get(f"{address}/metrics").text)
        eventually(lambda: 'code="499"' in httpx.get(f"{address}/metrics").text)
        slow.go.set()
        assert first.result().status_code == 200
    assert slow.calls == [1]
