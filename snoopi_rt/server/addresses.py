"""Addresses, hosts and origins as people type them, normalized for comparison; invalid ones raise InputError at the start."""

import ipaddress
import re
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from snoopi_rt.errors import InputError

DEFAULT_PORTS = {"http": 80, "https": 443}
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
PATH_PREFIX = re.compile(r"(/[\w.~-]+)+", re.ASCII)
MAX_MODEL_NAME = 200
"""Characters of a model's name in a request."""


def web_origin(text: str) -> str:
    """The origin as a browser sends it: lower case, without a default port or trailing slash; "*" and "null" stay. Raises InputError."""
    if text in ("*", "null"):
        return text
    invalid = InputError(f"origin {text!r} is not SCHEME://HOST, such as https://page.example")
    parts, port = _split(text.strip(), invalid)
    if (
        not text.strip().isprintable()
        or not parts.scheme
        or parts.username is not None
        or parts.path not in ("", "/")
        or parts.query
        or parts.fragment
    ):
        raise invalid
    host = _host(parts.hostname or "", invalid)
    return f"{parts.scheme}://{_bracketed(host)}{f':{port}' if port not in (None, DEFAULT_PORTS.get(parts.scheme)) else ''}"


def host_name(text: str) -> str:
    """The name or IP address in NAME, NAME:PORT, SCHEME://NAME/ and the like, as `called_host` returns it. Raises InputError."""
    invalid = InputError(f"host {text!r} is not a name or an address, such as server.example")
    bare = text.strip().partition("://")[2] or text.strip()
    with suppress(ValueError):
        return str(ipaddress.ip_address(bare))
    parts, _ = _split(f"//{bare}", invalid)
    if parts.username is not None or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise invalid
    return _host(parts.hostname or "", invalid)


def called_host(header: str) -> str | None:
    """The name or IP address in a Host header; None if it is invalid."""
    if not header.isprintable() or set(header) & set("@/?#\\ "):
        return None
    try:
        return _host(urlsplit(f"//{header}").hostname or "", ValueError())
    except ValueError:
        return None


def listen_host(text: str) -> str:
    """The address to listen on, without the brackets of IPv6. Raises InputError, also if it has a port or a scheme."""
    bare = text.strip()
    with suppress(ValueError):
        return str(ipaddress.ip_address(bare.removeprefix("[").removesuffix("]")))
    invalid = InputError(f"--host {text!r} is not a name or an address, such as 127.0.0.1")
    rest = bare.partition("://")[2] or bare
    parts, port = _split(f"//{rest}", invalid)
    host = _host(parts.hostname or "", invalid)
    if rest != bare or port is not None or parts.path:
        raise InputError(f"--host {text} is not just an address: give --host {host}{'' if port is None else f' --port {port}'}")
    return host


def path_prefix(text: str) -> str:
    """The path under which a proxy exposes the server, "" or /NAME. Raises InputError."""
    prefix = "/".join(["", *(part for part in text.strip().split("/") if part)])
    if prefix and ("://" in text or {".", ".."} & set(prefix.split("/")) or PATH_PREFIX.fullmatch(prefix) is None):
        raise InputError(f"root path {text!r} is not a path, such as /images")
    return prefix


def check_model_name(name: str) -> None:
    """Raises InputError for a name that clients cannot use in /v1/models/NAME."""
    if name in ("", ".", "..") or "/" in name or len(name) > MAX_MODEL_NAME or not name.isprintable():
        raise InputError(f"bundle name {name!r} cannot be part of a URL: give another with --bundle NAME=FOLDER")


def url(host: str, port: int, path: str = "") -> str:
    """The server's URL, for people."""
    return f"http://{_bracketed(host)}:{port}{path}"


def _split(text: str, invalid: InputError) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(text)
        return parts, parts.port
    except ValueError:
        raise invalid from None


def _host(name: str, invalid: ValueError) -> str:
    """A name in lower-case ASCII, or an IP address in its short form; raises `invalid` for anything else."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(name))
    try:
        ascii_name = name.removesuffix(".").encode("idna").decode().lower()
    except UnicodeError:
        raise invalid from None
    if HOST_NAME.fullmatch(ascii_name) is None:
        raise invalid
    return ascii_name


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
