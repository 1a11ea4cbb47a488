"""The embedded model on a server, and a browser."""

from collections.abc import Iterator
from typing import Any

import pytest

from snoopi_rt.loading import load


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from serving import served

    from snoopi_rt.server.settings import Settings

    with served(Settings({"small": lambda: load(threads=1)})) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from pages import CHROMIUM, sync_api

    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
