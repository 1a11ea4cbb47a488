"""What is around every request: its id, the key, figures and one line of log. Plain ASGI: a middleware of responses costs more."""

import asyncio
import hmac
import ipaddress
import secrets
import time
from contextlib import suppress

from fastapi.responses import RedirectResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from snoopi_rt.server.addresses import called_host
from snoopi_rt.server.http_errors import Refused
from snoopi_rt.server.logs import in_words, log, tell
from snoopi_rt.server.metrics import Metrics


class Around:
    """The application `app` for clients that have the key; `free` are beginnings of paths that need none, a whole path ends in "$".

    Without a key it answers only requests that call it by a name in `hosts` or by a loopback address: another name is that of a web page
    somewhere whose address was made this machine's (DNS rebinding), which a browser then lets read everything.
    Paths may begin with `root`, which a proxy may have taken away already, and end in a slash. HEAD is GET without the body.
    """

    def __init__(self, app: ASGIApp, key: str | None, free: tuple[str, ...], hosts: frozenset[str], root: str, metrics: Metrics) -> None:
        self._app, self._key, self._free, self._hosts, self._root, self._metrics = app, key, free, hosts, root, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, headers, code = time.perf_counter(), Headers(scope=scope), 0
        method, path = scope["method"], self._route(scope["path"])
        state = {**scope.get("state", {}), "facts": {}}
        given = headers.get("x-request-id", "")
        state["id"] = given if 0 < len(given) <= 100 and given.isprintable() and given.isascii() else secrets.token_hex(8)
        # A copy: the server below goes by its own, which says HEAD.
        scope = {**scope, "state": state, "root_path": self._root, "path": self._root + (path.rstrip("/") or "/")}
        scope["method"] = "GET" if method == "HEAD" else method

        async def answer(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["id"].encode())]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            self._allow(scope, headers, path.rstrip("/") or "/")
            # The page's own links start from the last slash.
            app = RedirectResponse(f"{self._root}/") if path == "" else self._app
            await app(scope, receive, answer)
        except Refused as refused:
            await refused.response()(scope, receive, answer)
        except asyncio.CancelledError:
            if not code:  # the server ends and waits no more
                stopping = Refused(503, "the server is stopping", "server_error", {"retry-after": "5"})
                await stopping.response()(scope, receive, answer)
            raise
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
            facts = {"id": state["id"], "method": method, "path": route, "code": code, "seconds": round(seconds, 4), **state["facts"]}
            people = f"{method} {route} {code} {seconds:.3f} s" + in_words(state["facts"])
            tell("request", people, **facts)

    def _route(self, path: str) -> str:
        """The path without the prefix; "" is the prefix itself."""
        return path.removeprefix(self._root) if f"{path}/".startswith(f"{self._root}/") else path

    def _allow(self, scope: Scope, headers: Headers, path: str) -> None:
        """Raises Refused without the key, or without one for another host."""
        if self._key is None and not self._is_here(headers.get("host", "localhost")):
            raise Refused(421, f"this server is not {headers['host'][:200]}: see --allowed-host")
        if self._key is None or f"{path}$".startswith(self._free) or scope["method"] == "OPTIONS":
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key.encode()):
            raise Refused(401, "wrong or missing API key", "authentication_error", {"www-authenticate": "Bearer"})

    def _is_here(self, host: str) -> bool:
        name = called_host(host)
        with suppress(ValueError):
            return ipaddress.ip_address(name or "").is_loopback
        return name == "localhost" or name in self._hosts
