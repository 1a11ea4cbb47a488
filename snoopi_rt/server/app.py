"""The ASGI application: its middleware, its routes and the models behind them. `snoopi-rt serve` runs it under uvicorn."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from snoopi_rt import __version__
from snoopi_rt.server import openapi, routes
from snoopi_rt.server.http_errors import HANDLERS
from snoopi_rt.server.image_store import ImageStore
from snoopi_rt.server.logs import log_event
from snoopi_rt.server.memory import keep_trimming
from snoopi_rt.server.metrics import Metrics
from snoopi_rt.server.middleware import RequestMiddleware
from snoopi_rt.server.models import Models, OpenModel, open_here
from snoopi_rt.server.settings import Settings

Opened = Callable[[list[str], dict[str, str]], None]
"""opened(models, broken), called once: the names of the models that opened, and an error for each of the others."""


def log_opened(models: list[str], broken: dict[str, str], address: str | None = None) -> None:
    """Logs which bundles are served, and why others are not."""
    for name, error in broken.items():
        log_event("bundle cannot be served", f"{name} cannot be served: {error}", model=name, error=error)
    fields = {} if address is None else {"address": address}
    message = f"serving {', '.join(models) or 'no bundle'}" + ("" if address is None else f" on {address} (Ctrl-C ends it)")
    log_event("ready", message, models=models, broken=broken, **fields)


def application(settings: Settings, open_model: OpenModel = open_here, opened: Opened = log_opened) -> FastAPI:
    """The ASGI application. Its models are opened when it starts; one that is broken is reported in the log and by /readyz."""
    models, metrics = Models(settings), Metrics()

    async def open_models() -> None:
        opened(*await models.open_all(open_model, metrics))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Health checks are answered meanwhile: an engine may compile for minutes.
        tasks = [asyncio.create_task(open_models()), asyncio.create_task(keep_trimming())]
        yield
        for task in tasks:
            task.cancel()
        await models.close()

    app = FastAPI(
        title="snoopi-rt",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=HANDLERS,
    )
    app.state.settings, app.state.models, app.state.metrics, app.state.images = settings, models, metrics, ImageStore()
    app.include_router(routes.router)
    hosts = frozenset(filter(None, (*settings.allowed_hosts, *(urlsplit(origin).hostname for origin in settings.cors))))
    app.add_middleware(
        RequestMiddleware,
        key=settings.key,
        public_paths=routes.PUBLIC_PATHS,
        hosts=hosts,
        root_path=settings.root_path,
        metrics=metrics,
    )
    if settings.cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["GET", "POST"], allow_headers=["*"])
    app.openapi = partial(openapi.document, app)  # type: ignore[method-assign]
    return app
