"""What is around every request: its id, the key, figures and one line of log. Plain ASGI: a middleware of responses costs more."""

import hmac
import json
import logging
import secrets
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from snoopi_rt.server.metrics import Metrics
from snoopi_rt.server.refusals import Refused

log = logging.getLogger("snoopi_rt.server")


class Around:
    """The application `app` for clients that have the key; `free` are the paths that need none."""

    def __init__(self, app: ASGIApp, key: str | None, free: frozenset[str], metrics: Metrics) -> None:
        self._app, self._key, self._free, self._metrics = app, key, free, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, headers, code = time.perf_counter(), Headers(scope=scope), 0
        state = scope.setdefault("state", {})
        given = headers.get("x-request-id", "")
        state["id"] = given if 0 < len(given) <= 100 and given.isprintable() and given.isascii() else secrets.token_hex(8)
        state["facts"] = {}

        async def answer(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["id"].encode())]
            await send(message)

        try:
            self._allow(scope, headers)
            await self._app(scope, receive, answer)
        except Refused as refused:
            await refused.response()(scope, receive, answer)
        except Exception as error:
            log.exception("request %s", state["id"])
            if code:  # half an answer is out: the server cuts the connection
                raise
            await Refused(500, f"internal error: {type(error).__name__}", "server_error").response()(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - begun
            self._metrics.requests.labels(route, code).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            facts = {"id": state["id"], "method": scope["method"], "path": route, "code": code, "seconds": round(seconds, 4)}
            tell("request", **facts, **state["facts"])

    def _allow(self, scope: Scope, headers: Headers) -> None:
        """Raises Refused without the key."""
        if self._key is None or scope["path"] in self._free or scope["method"] == "OPTIONS":
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key.encode()):
            raise Refused(401, "wrong or missing API key", "authentication_error", {"www-authenticate": "Bearer"})


def tell(what: str, **facts: Any) -> None:
    """One line of JSON in the log."""
    log.info(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "what": what, **facts}))
