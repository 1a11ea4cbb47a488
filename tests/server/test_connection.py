"""Slow, greedy and silent clients cost the server little."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from snoopi_rt.pipeline import Pipeline
from snoopi_rt.result import Result

pytest.importorskip("fastapi", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx")
from serving import DRAW, command, served  # noqa: E402

from snoopi_rt.server import connection  # noqa: E402
from snoopi_rt.server.settings import Settings  # noqa: E402


def test_a_connection_that_says_nothing_or_half_a_request_is_closed(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    with served(Settings({"tiny": lambda: pipe})) as address:
        port = int(address.rpartition(":")[2])
        for said in (b"", b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nX-Slow: "):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.settimeout(5)
                client.sendall(said)
                assert client.recv(100) == b""
        with httpx.Client() as client:  # while one that asks again and again keeps its own
            for _ in range(4):
                assert client.post(address + DRAW, json={"prompt": "a cat"}).status_code == 200
                time.sleep(0.15)


def test_thousands_of_headers_are_refused(address: str) -> None:
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n" + b"a:b\r\n" * 1000)
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{address}/healthz", headers=[("a", "b")] * 200).status_code == 200


def test_endless_headers_are_cut_off_long_before_they_fill_the_memory(address: str) -> None:
    port = int(address.rpartition(":")[2])
    for start in (b"GET /healthz HTTP/1.1\r\nx: ", b"POST " + DRAW.encode() + CHUNKED + b"0\r\nx: "):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(start)
            sent = 0
            with pytest.raises((ConnectionError, BrokenPipeError)):
                while sent < 50 * 2**20:
                    sent += connection.send(b"a" * 2**16)
            assert sent < 16 * 2**20  # what the system's own buffers take
    assert httpx.get(f"{address}/healthz").status_code == 200


CHUNKED = b" HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n"


def test_a_client_that_does_not_read_its_answer_is_cut_off(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.2)
    ended = threading.Event()
    lost = connection.Connection.connection_lost
    monkeypatch.setattr(connection.Connection, "connection_lost", lambda self, error: (lost(self, error), ended.set()))
    monkeypatch.setattr(Result, "encode", lambda *_: [b"x" * 2**23])
    with served(Settings({"tiny": lambda: pipe})) as address:
        ended.clear()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(address.rpartition(":")[2])))
            body = b'{"prompt": "a cat"}'
            head = f"POST {DRAW} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            assert ended.wait(10)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_sent_ahead_and_a_log_that_nobody_reads_cost_next_to_nothing() -> None:
    """Unbounded, 60 clients that send thousands of requests and read none take 0.9 GB; a full pipe on standard error stops everything."""

    def megabytes(process: subprocess.Popen) -> float:
        return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    with command() as (process, address), ExitStack() as clients:
        before = megabytes(process)
        for _ in range(60):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))))
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.sendall(b"GET /v HTTP/1.1\r\nhost: localhost\r\n\r\n" * 13_000)
        with httpx.Client() as patient:
            for _ in range(600):
                assert patient.get(f"{address}/healthz").status_code == 200
        assert megabytes(process) < before + 64
        clients.close()  # they go before they are answered
        assert httpx.post(address + DRAW, json={"prompt": "a cat"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()


def test_requests_that_are_sent_ahead_are_answered_in_order(address: str) -> None:
    body = b'{"prompt": "a cat"}'
    drawing = f"POST {DRAW} HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n".encode()
    asked = [
        (b"GET /healthz HTTP/1.1\r\n", b""),
        (drawing, body),
        (b"GET /nothing HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n", b""),
    ]
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
        sent = [asked[i % 3][0] + f"host: localhost\r\nx-request-id: {i}\r\n\r\n".encode() + asked[i % 3][1] for i in range(300)]
        client.sendall(b"".join(sent) + b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        client.settimeout(30)
        answers = b"".join(iter(lambda: client.recv(2**16), b""))
    assert re.findall(rb"x-request-id: (\d+)\r", answers)[:300] == [b"%d" % i for i in range(300)]
    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"200", b"200", b"404"] * 100 + [b"200"]
