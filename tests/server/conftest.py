"""The tiny bundle on a server, and one whose generator waits."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.engines.fake import FakeEngine
from snoopi_rt.pipeline import Pipeline

if TYPE_CHECKING:
    from serving import Slow


@pytest.fixture
def slow(original: Bundle, fakes: dict[str, FakeEngine]) -> "Slow":
    from serving import Slow

    return Slow(original, fakes)


@pytest.fixture
def address(pipe: Pipeline) -> Iterator[str]:
    from serving import served

    from snoopi_rt.server.settings import Settings

    with served(Settings({"tiny": lambda: pipe})) as address:
        yield address
