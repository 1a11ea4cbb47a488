"""The part of the Hugging Face hub's protocol that a download uses, on this machine."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves models by name: their files' contents. `cut`: bytes of the file `large` after which a connection breaks, and how often."""

    def __init__(self, models: Mapping[str, Mapping[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.models = models
        self.large, self.cut, self.cuts, self.broken = "", 0, 0, ""
        self.sent: list[tuple[str, str, int, int]] = []
        """Model, file, first byte and length of each answer with contents."""
        self.asked: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


@contextmanager
def serving(models: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    with Hub(models) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class HubAnswer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: a second one would wait for the first one's acknowledgement

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((path, self.headers.get("User-Agent", "")))
        match = re.match(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?$", path)
        if "/gated" in path:
            self.refuse(403, "GatedRepo")
        elif match is None or match[1] not in self.server.models:
            self.refuse(404, "RepoNotFound")
        elif match[3] not in (None, "main", "v1", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif match[2] in (None, "revision"):
            self.answer(json.dumps({"id": match[1], "sha": COMMIT, "siblings": []}).encode())
        elif match[2] == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.models[match[1]].items()
            ]
            self.answer(json.dumps(entries).encode())
        elif match[4] in self.server.models[match[1]]:
            self.send_file(match[1], match[4])
        else:
            self.refuse(404, "EntryNotFound")

    def send_file(self, model: str, name: str) -> None:
        data = self.server.models[model][name]
        start = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "GET" and name == self.server.broken:
            self.refuse(500, "")
        elif self.command == "GET" and name == self.server.large and self.server.cuts:
            self.server.cuts -= 1
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + self.server.cut])
            self.server.sent.append((model, name, start, self.server.cut))
            self.close_connection = True
        elif start:
            self.answer(data[start:], headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, 206)
            self.server.sent.append((model, name, start, len(data) - start))
        else:
            self.answer(data, headers)
            if self.command == "GET":
                self.server.sent.append((model, name, 0, len(data)))
