"""The application under uvicorn, on sockets of its own."""

import errno
import ipaddress
import math
import socket
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from snoopi_rt.errors import InputError
from snoopi_rt.interrupts import end_now
from snoopi_rt.server.addresses import listen_host, url
from snoopi_rt.server.app import application, log_opened
from snoopi_rt.server.connection import connections
from snoopi_rt.server.logs import LineHandler, write_logs
from snoopi_rt.server.models import none_served
from snoopi_rt.server.settings import Settings

GRACE = 30.0
"""Seconds for which accepted requests are finished after a signal to stop; longer if the timeout of a request is."""


class Server(uvicorn.Server):
    """Finishes accepted requests after the first signal to stop, and ends at once on the second.

    Flushes the log before uvicorn raises the signal again.
    """

    def __init__(self, config: uvicorn.Config, log: LineHandler) -> None:
        super().__init__(config)
        self._log, self._signalled = log, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            end_now(sig)
        self._signalled = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._log.flush()


def check_address(host: str, key: str | None) -> str:
    """The address to listen on. Raises InputError for any other than loopback if there is no API key."""
    host = listen_host(host)
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and key is None:
        raise InputError(
            f"--host {host} can be reached by other machines and needs an API key: give --api-key-file FILE or $SNOOPI_RT_API_KEY"
        )
    return host


def listening(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to all addresses of the host. Raises InputError if none can be bound, or one is in use."""
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            try:
                sockets.append(_bound(family, kind, protocol, address))
            except OSError as error:
                failure = error
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # such as localhost if there is no IPv6
                    break
    except OSError as error:  # no such name
        failure = error
    if failure is not None and (not sockets or failure.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
        for bound in sockets:
            bound.close()
        reason = "is the port in use?" if failure.errno == errno.EADDRINUSE else (failure.strerror or str(failure)).lower()
        raise InputError(f"{url(host, port)} cannot be served: {reason}") from failure
    return sockets


def _bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # IPv4 has a socket of its own
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def serve(settings: Settings, host: str, port: int, log_json: bool = True) -> None:
    """Serves until a signal; accepted requests are then finished, unless a second signal comes.

    Raises InputError if the address cannot be used, BundleError if no bundle can be opened.
    """
    host = check_address(host, settings.key)
    sockets, log, broken = listening(host, port), LineHandler(2), {}
    write_logs(log_json, log)
    address = url(host, port, settings.root_path)

    def opened(models: list[str], errors: dict[str, str]) -> None:
        if models:
            log_opened(models, errors, address)
        else:
            broken.update(errors)
            server.should_exit = True

    config = uvicorn.Config(
        application(settings, opened=opened),
        http=connections(),
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(max(GRACE, settings.timeout)),
    )
    server = Server(config, log)
    with suppress(KeyboardInterrupt):  # uvicorn has already stopped
        server.run(sockets)
    if broken:
        raise none_served(broken)
