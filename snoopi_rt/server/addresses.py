"""What people type for an address, in the one form that it is compared in; what cannot be meant is an InputError at the start."""

import ipaddress
import re
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from snoopi_rt.errors import InputError

DEFAULT_PORTS = {"http": 80, "https": 443}
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
PATH_PREFIX = re.compile(r"(/[\w.~-]+)+", re.ASCII)
LONGEST_NAME = 200
"""Characters of a model's name in a request."""


def web_origin(text: str) -> str:
    """The origin as a browser sends it: lower case, no default port, no slash at the end; "*" and "null" stay. Raises InputError."""
    if text in ("*", "null"):
        return text
    wrong = InputError(f"origin {text!r} is not SCHEME://HOST, such as https://page.example")
    parts, port = _split(text.strip(), wrong)
    if (
        not text.strip().isprintable()
        or not parts.scheme
        or parts.username is not None
        or parts.path not in ("", "/")
        or parts.query
        or parts.fragment
    ):
        raise wrong
    host = _host(parts.hostname or "", wrong)
    return f"{parts.scheme}://{_bracketed(host)}{f':{port}' if port not in (None, DEFAULT_PORTS.get(parts.scheme)) else ''}"


def host_name(text: str) -> str:
    """The name or IP address of NAME, NAME:PORT, SCHEME://NAME/ and the like, as `called_host` gives it. Raises InputError."""
    wrong = InputError(f"host {text!r} is not a name or an address, such as server.example")
    bare = text.strip().partition("://")[2] or text.strip()
    with suppress(ValueError):
        return str(ipaddress.ip_address(bare))
    parts, _ = _split(f"//{bare}", wrong)
    if parts.username is not None or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise wrong
    return _host(parts.hostname or "", wrong)


def called_host(header: str) -> str | None:
    """The name or IP address in a Host header, None where it holds neither."""
    if not header.isprintable() or set(header) & set("@/?#\\ "):
        return None
    try:
        return _host(urlsplit(f"//{header}").hostname or "", ValueError())
    except ValueError:
        return None


def listen_host(text: str) -> str:
    """The address to listen on, without the brackets of IPv6. Raises InputError, above all for a port or a scheme."""
    bare = text.strip()
    with suppress(ValueError):
        return str(ipaddress.ip_address(bare.removeprefix("[").removesuffix("]")))
    wrong = InputError(f"--host {text!r} is not a name or an address, such as 127.0.0.1")
    rest = bare.partition("://")[2] or bare
    parts, port = _split(f"//{rest}", wrong)
    host = _host(parts.hostname or "", wrong)
    if rest != bare or port is not None or parts.path:
        raise InputError(f"--host {text} is more than an address: give --host {host}{'' if port is None else f' --port {port}'}")
    return host


def path_prefix(text: str) -> str:
    """The path below which a proxy shows the server, "" or /NAME. Raises InputError."""
    prefix = "/".join(["", *(part for part in text.strip().split("/") if part)])
    if prefix and ("://" in text or {".", ".."} & set(prefix.split("/")) or PATH_PREFIX.fullmatch(prefix) is None):
        raise InputError(f"root path {text!r} is not a path, such as /images")
    return prefix


def check_model_name(name: str) -> None:
    """Returns for a name that clients can write into /v1/models/NAME, else raises InputError."""
    if name in ("", ".", "..") or "/" in name or len(name) > LONGEST_NAME or not name.isprintable():
        raise InputError(f"bundle name {name!r} cannot be part of an address: --bundle NAME=FOLDER gives it another, without a slash")


def url(host: str, port: int, path: str = "") -> str:
    """The address for people."""
    return f"http://{_bracketed(host)}:{port}{path}"


def _split(text: str, wrong: InputError) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(text)
        return parts, parts.port
    except ValueError:
        raise wrong from None


def _host(name: str, wrong: ValueError) -> str:
    """A name in lower case and in ASCII, or an IP address in its short form; raises `wrong` for anything else."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(name))
    try:
        ascii_name = name.removesuffix(".").encode("idna").decode().lower()
    except UnicodeError:
        raise wrong from None
    if HOST_NAME.fullmatch(ascii_name) is None:
        raise wrong
    return ascii_name


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
