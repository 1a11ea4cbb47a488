"""The settings of a server, validated before it starts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snoopi_rt.errors import InputError
from snoopi_rt.files import read_bounded, reason
from snoopi_rt.server.addresses import check_model_name, host_name, path_prefix, web_origin

if TYPE_CHECKING:
    from snoopi_rt.pipeline import Pipeline

MAX_TIMEOUT = 86_400
"""Seconds: a longer timeout is no timeout."""
MAX_KEY_FILE = 2**16
"""Bytes of a file with a key."""


@dataclass(frozen=True)
class Settings:
    """The settings of a server. Raises InputError for values that make no sense."""

    models: "dict[str, Callable[..., Pipeline]]"
    """What opens each model, by name; the first is the default. On Ray it is called with `engine` and `low_memory`, as `load` is."""
    key: str | None = None
    """The bearer token that clients must send; None requires none."""
    max_batch: int = 16
    """Images of waiting requests that are drawn in one call; 1 draws each request alone."""
    batch_wait: float = 0.0
    """Seconds that a batch which is not full waits for more requests."""
    queue: int = 256
    """Images that may wait for a model."""
    max_images: int = 16
    """Images per request."""
    max_body: int = 64 * 1024
    """Bytes per request body."""
    timeout: float = 60.0
    """Seconds per request."""
    log_prompts: bool = False
    cors: tuple[str, ...] = ()
    """The origins of web pages that may call."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides localhost by which it may be called without a key."""
    truncate: bool = False
    """Whether prompts that are too long are cut unless the request says otherwise."""
    lenient: bool = False
    """Whether to draw the nearest supported size, and to use the first model in place of an unknown one."""
    root_path: str = ""
    """The path under which a proxy exposes the server."""

    def __post_init__(self) -> None:
        for name in self.models:
            check_model_name(name)
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise InputError(f"timeout must be a number of seconds up to {MAX_TIMEOUT}, got {self.timeout:g}")
        if not 0 <= self.batch_wait < math.inf:
            raise InputError(f"batch_wait must be a number of seconds, got {self.batch_wait:g}")
        object.__setattr__(self, "cors", tuple(map(web_origin, self.cors)))
        object.__setattr__(self, "allowed_hosts", tuple(map(host_name, self.allowed_hosts)))
        object.__setattr__(self, "root_path", path_prefix(self.root_path))


def read_key(file: Path | None, environment: str | None) -> str | None:
    """The API key: a file's first line, or else the environment's. Raises InputError for an unreadable file and for an invalid key."""
    if file is None and not environment:
        return None
    source = "$SNOOPI_RT_API_KEY" if file is None else str(file)
    try:
        text = (environment or "") if file is None else read_bounded(file, MAX_KEY_FILE).decode(errors="replace")
    except OSError as error:
        raise InputError(f"cannot read the key in {file}: {reason(error)}") from error
    key = text.strip().partition("\n")[0].strip()
    if not key:
        raise InputError(f"there is no key in {source}")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"the key in {source} must be one word of ASCII letters, digits and signs")
    return key
