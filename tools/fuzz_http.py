"""Bytes on a socket of `snoopi-rt serve`, judged by the rule of `fuzz_kinds.py`."""

import base64
import io
import json
import logging
import socket
import threading
import time
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import uvicorn
from fuzz_kinds import ASKED, LONGEST, PICTURE, REFUSED, Finding, Kind, pixels, require_picture
from mutations import ODD, TEXTS, damaged_bytes, damaged_json

from snoopi_rt import image
from snoopi_rt.loading import load
from snoopi_rt.server.app import application
from snoopi_rt.server.connection import connections
from snoopi_rt.server.settings import Settings

DRAW = "/v1/images/generations"
PATHS = (
    DRAW,
    "/",
    "/v1/models",
    "/v1/models/tiny",
    "/healthz",
    "/readyz",
    "/metrics",
    "/page.js",
    "/openapi.json",
    "/v1/images/files/x.png",
)
IDLE = 0.1
"""Seconds without an answer after which a request counts as unfinished."""


class Http(Kind):
    """Requests whose bytes, headers or bodies are damaged; each answer is whole, below 500, and its picture the right one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pipe = load(self.bundle.folder, "cpu")
        self.expected = self.pipe.generate(**ASKED).images[0]
        self.errors: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.errors.append(logging.Formatter().format(record))  # type: ignore[method-assign]
        logging.basicConfig(handlers=[handler], force=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        app = application(Settings({"tiny": partial(load, str(self.bundle.folder), engine="cpu")}))
        self.server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", self.port, http=connections(), log_config=None))
        threading.Thread(target=self.server.run, daemon=True).start()
        while not self.server.started or b"ready" not in self._ask(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            time.sleep(0.01)

    def judge(self, random: Random) -> str:
        self.errors.clear()
        answers = self._ask(self._request(random), random)
        outcome = self._judge(answers)
        if serious := [error for error in self.errors if "Traceback" in error or "Invalid HTTP request" not in error]:
            raise Finding(f"logged: {serious[0].strip().splitlines()[-1][:300]}")
        if random.random() < 0.02:
            body = {**ASKED, "size": "16x16"}
            if self._judge(self._ask(self._post(json.dumps(body).encode()))) != PICTURE:
                raise Finding("no picture for a good request")
        return outcome

    def _judge(self, answers: bytes) -> str:
        """PICTURE or REFUSED. Raises Finding for what is no answer of this server."""
        outcome = REFUSED
        while answers:
            head, found, rest = answers.partition(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            status = lines[0].split(" ")
            if not found or status[0] != "HTTP/1.1" or not 200 <= int(status[1]) < 500:
                raise Finding(f"answer {lines[0][:100]!r}")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            size = int(headers.get("content-length", len(rest)))
            body, answers = rest[:size], rest[size:]
            if answers and not answers.startswith(b"HTTP/1.1"):  # of HEAD
                body, answers = b"", rest
            kind = headers.get("content-type", "")
            if int(status[1]) >= 400 and kind.startswith("application/json") and body:
                message = json.loads(body)["error"]["message"]
                if not message.strip() or len(message.splitlines()) > 1 or len(message) > LONGEST:
                    raise Finding(f"no clear line: {message[:200]!r}")
            elif kind.startswith("application/json") and body and {"data", "timings"} <= (answer := json.loads(body)).keys():
                self._judge_pictures(answer)
                outcome = PICTURE
        return outcome

    def _judge_pictures(self, answer: dict[str, Any]) -> None:
        for drawn in answer["data"]:
            if answer["output_format"] != "png":
                continue
            path = self.folder / "answer.png"
            path.write_bytes(base64.b64decode(drawn["b64_json"]))
            made = image.read_metadata(path)
            scale = float(made["negative_scale"]) if "negative_scale" in made else None
            width, _, height = made["size"].partition("x")
            again = self.pipe.generate(
                made["prompt"],
                made.get("negative_prompt"),
                scale,
                int(made["seed"]),
                size=(int(height), int(width)),
                truncate="truncate" in made,
            )
            require_picture(pixels(io.BytesIO(path.read_bytes())), again.images[0], "an answer")

    def _request(self, random: Random) -> bytes:
        body: dict[str, Any] = {**ASKED, "size": "16x16", "n": random.randint(1, 2)}
        if random.random() < 0.3:
            body |= {random.choice(("response_format", "output_format", "model", "truncate", "user", "quality")): random.choice(ODD)}
        text = damaged_json(random, body) if random.random() < 0.6 else json.dumps(body).encode()
        if random.random() < 0.5:
            return self._post(text)
        method = random.choice(("POST", "POST", "GET", "HEAD", "OPTIONS", "PUT", "get", "", "\u00e9"))
        path = random.choice(
            (*PATHS, DRAW, DRAW, DRAW + "/", "//", "/../etc/passwd", "/%00", "/%ff", "*", "http://localhost/healthz", "/" + "x" * 9000)
        )
        sizes = (len(text), len(text), len(text), len(text) + 1, 0, -1, 2**63, 10**30)
        headers = [("Host", random.choice(("localhost", "localhost:80", "[", "evil.example", ""))), ("Content-Type", "application/json")]
        headers += [random.choice((("Content-Length", str(random.choice(sizes))), ("Transfer-Encoding", "chunked")))]
        odd = (
            "Content-Length",
            "Transfer-Encoding",
            "Host",
            "Connection",
            "Expect",
            "Upgrade",
            "X-Request-Id",
            "Origin",
            "Authorization",
            "A\0",
        )
        values = (*TEXTS[:-1], "close", "chunked", "100-continue", "h2c", "websocket", "1", "gzip, chunked", "x" * 70_000)
        headers += [(random.choice(odd), random.choice(values)) for _ in range(random.randint(0, 3))]
        lines = [
            f"{method} {path} HTTP/{random.choice(('1.1', '1.1', '1.0', '2.0', '0.9'))}",
            *(f"{name}: {value}" for name, value in headers),
        ]
        if ("Transfer-Encoding", "chunked") in headers:
            text = b"%x\r\n" % random.choice((len(text), len(text), len(text) + 5, 2**40)) + text + b"\r\n0\r\n\r\n"
        request = "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n" + text
        if random.random() < 0.4:
            request = damaged_bytes(random, request)
        return request * random.choice((1, 1, 1, 2, 5))

    def _post(self, body: bytes) -> bytes:
        return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
            DRAW.encode(),
            len(body),
            body,
        )

    def _ask(self, request: bytes, random: Random | None = None) -> bytes:
        """All that comes back until nothing more does; sent in pieces if a generator is given."""
        answers = b""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            try:
                cut = random.randrange(len(request) + 1) if random is not None and random.random() < 0.3 else 0
                for part in (request[:cut], request[cut:]):
                    connection.sendall(part)
                connection.settimeout(2.0 if random is None else IDLE)
                while part := connection.recv(2**20):
                    answers += part
                    if self._is_whole(answers):
                        break
            except (TimeoutError, ConnectionError):
                pass
        return answers if self._is_whole(answers) else b""

    def _is_whole(self, answers: bytes) -> bool:
        """Whether the last answer ends here."""
        while answers:
            head, found, rest = answers.partition(b"\r\n\r\n")
            sizes = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            if not found or (sizes and len(rest) < sizes[0] and rest):
                return False
            answers = rest[sizes[0] :] if sizes else b""
        return True
