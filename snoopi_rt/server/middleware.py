"""Request middleware: request ids, the API key, metrics and one log line per request. Plain ASGI, which costs less than Starlette's own."""

import asyncio
import hmac
import ipaddress
import secrets
import time
from contextlib import suppress
from typing import Any

from fastapi.responses import RedirectResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from snoopi_rt.server.addresses import called_host
from snoopi_rt.server.http_errors import HttpError
from snoopi_rt.server.logs import log, log_event, plain_fields
from snoopi_rt.server.metrics import Metrics


class RequestMiddleware:
    """The application `app`, for clients that send the key; `public_paths` need none: prefixes, or whole paths that end in "$".

    If no key is set, only requests are answered whose Host header is in `hosts` or a loopback address: otherwise a web page whose name
    was made to resolve to this machine (DNS rebinding) could read everything.
    Paths may begin with `root_path`, which a proxy may already have stripped, and may end in a slash. HEAD is GET without the body.
    """

    def __init__(
        self, app: ASGIApp, key: str | None, public_paths: tuple[str, ...], hosts: frozenset[str], root_path: str, metrics: Metrics
    ) -> None:
        self._app, self._key, self._public_paths, self._hosts = app, key, public_paths, hosts
        self._root_path, self._metrics = root_path, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, headers, status = time.perf_counter(), Headers(scope=scope), 0
        method, path = scope["method"], self._route(scope["path"])
        request_id = headers.get("x-request-id", "")
        if not (0 < len(request_id) <= 100 and request_id.isprintable() and request_id.isascii()):
            request_id = secrets.token_hex(8)
        log_fields: dict[str, Any] = {}
        state = {**scope.get("state", {}), "id": request_id, "log_fields": log_fields}
        # A copy: uvicorn keeps its own, in which the method stays HEAD.
        scope = {**scope, "state": state, "root_path": self._root_path, "path": self._root_path + (path.rstrip("/") or "/")}
        scope["method"] = "GET" if method == "HEAD" else method

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            self._allow(scope, headers, path.rstrip("/") or "/")
            # The page's own links start from the last slash.
            app = RedirectResponse(f"{self._root_path}/") if path == "" else self._app
            await app(scope, receive, answer)
        except HttpError as error:
            await error.response()(scope, receive, answer)
        except asyncio.CancelledError:
            if not status:  # the server is stopping and waits no longer
                stopping = HttpError(503, "the server is stopping", "server_error", {"retry-after": "5"})
                await stopping.response()(scope, receive, answer)
            raise
        except Exception as error:
            log.exception("request %s", request_id)
            if status:  # the answer has begun: the server cuts the connection
                raise
            await HttpError(500, f"internal error: {type(error).__name__}", "server_error").response()(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - start
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            message = f"{method} {route} {status} {seconds:.3f} s" + plain_fields(log_fields)
            fields = {"id": request_id, "method": method, "path": route, "status": status, "seconds": round(seconds, 4)}
            log_event("request", message, **fields, **log_fields)

    def _route(self, path: str) -> str:
        """The path without the prefix; "" is the prefix itself."""
        return path.removeprefix(self._root_path) if f"{path}/".startswith(f"{self._root_path}/") else path

    def _allow(self, scope: Scope, headers: Headers, path: str) -> None:
        """Raises HttpError for a request without the key; if none is set, for one that calls the server by an unknown name."""
        if self._key is None and not self._is_known_host(headers.get("host", "localhost")):
            raise HttpError(421, f"this server is not {headers['host'][:200]}: see --allowed-host")
        if self._key is None or f"{path}$".startswith(self._public_paths) or scope["method"] == "OPTIONS":
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key.encode()):
            raise HttpError(401, "wrong or missing API key", "authentication_error", {"www-authenticate": "Bearer"})

    def _is_known_host(self, host: str) -> bool:
        name = called_host(host)
        with suppress(ValueError):
            return ipaddress.ip_address(name or "").is_loopback
        return name == "localhost" or name in self._hosts
