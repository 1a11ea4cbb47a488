"""The images that were returned as URLs: in memory, for an hour or until newer ones need the room."""

import secrets

from cachetools import TTLCache

from snoopi_rt.errors import InputError

MAX_BYTES, MAX_SECONDS = 256 * 2**20, 3600.0
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class ImageStore:
    """Encoded images by name. Names are unguessable: only the client that asked for an image knows it, so no key is needed."""

    def __init__(self) -> None:
        self._files: TTLCache[str, bytes] = TTLCache(MAX_BYTES, MAX_SECONDS, getsizeof=len)

    def add(self, file: bytes, format: str) -> str:
        """Stores an encoded image; returns its name. Raises InputError for one that is larger than the store."""
        name = f"{secrets.token_hex(16)}.{format}"
        try:
            self._files[name] = file
        except ValueError:
            raise InputError(f"an image of {len(file)} bytes is too large for a URL: ask for b64_json") from None
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """An image and its media type; None if it has expired or never existed."""
        file = self._files.get(name)
        return None if file is None else (file, MEDIA_TYPES[name.rpartition(".")[2]])
