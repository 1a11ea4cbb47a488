"""The application: routes, limits, request ids, logs. Any ASGI server runs it; `snoopi-rt serve` uses uvicorn."""

import asyncio
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from starlette.requests import ClientDisconnect

from snoopi_rt import __version__
from snoopi_rt.errors import BundleError, Cancelled, InputError, SnoopiError
from snoopi_rt.files import read_bounded, reason
from snoopi_rt.pipeline import EMBEDDED, Pipeline
from snoopi_rt.server import schema
from snoopi_rt.server.addresses import check_model_name, host_name, path_prefix, web_origin
from snoopi_rt.server.batcher import Batcher, Drawing, QueueFull
from snoopi_rt.server.http_errors import CODES, Refused
from snoopi_rt.server.logs import tell
from snoopi_rt.server.metrics import Metrics
from snoopi_rt.server.middleware import Around
from snoopi_rt.tokenizer import PromptTooLong

KEPT_BYTES, KEPT_SECONDS = 256 * 2**20, 3600.0
"""Images that are given as addresses stay in memory until others need the room, or so long."""
LONGEST = 86_400.0
"""Seconds: a longer timeout is no timeout."""
SLOW = 1.0
"""Seconds that an image may take which is drawn only to be timed."""
LONGEST_KEY = 2**16
"""Bytes of a file with a key."""
FOLDER = Path(__file__).parent / "page"
PAGE = {"index.html": "text/html; charset=utf-8", "page.css": "text/css"} | dict.fromkeys(
    ("page.js", "pictures.js", "ideas.js", "history.js", "words.js"), "text/javascript"
)
SAFE = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True)
class Settings:
    """What a server is told.

    models: what opens each, by the bundle's name (on Ray it is given `engine` and `low_memory`, as `load`); the first is the default. key:
    what clients must send as a bearer token, None is nothing. together: images of waiting requests that are drawn in one call, 1 draws
    each request alone. batch_wait: seconds that a batch waits for more. queue: images that may wait for a model. most: images of one
    request. body: bytes of one request. timeout: seconds of one request. prompts_in_log: write prompts into the log. origins: of web
    pages that may call (CORS). hosts: names besides localhost by which it may be called without a key. truncate: cut prompts that are
    too long where a request does not say otherwise. lenient: draw the nearest size, and take an unknown model for the first one. root:
    the path below which a proxy shows the server.
    Raises InputError for what cannot be meant.
    """

    models: dict[str, Callable[..., Pipeline]]
    key: str | None = None
    together: int = 16
    batch_wait: float = 0.0
    queue: int = 256
    most: int = 16
    body: int = 64 * 1024
    timeout: float = 60.0
    prompts_in_log: bool = False
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    truncate: bool = False
    lenient: bool = False
    root: str = ""

    def __post_init__(self) -> None:
        for name in self.models:
            check_model_name(name)
        if not (0 < self.timeout <= LONGEST and math.isfinite(self.batch_wait)):
            raise InputError(f"timeout must be a number of seconds up to {LONGEST:g}, got {self.timeout:g}")
        object.__setattr__(self, "origins", tuple(map(web_origin, self.origins)))
        object.__setattr__(self, "hosts", tuple(map(host_name, self.hosts)))
        object.__setattr__(self, "root", path_prefix(self.root))


@dataclass
class State:
    """What is alive while a server runs: what draws, by model, and why others could not be opened."""

    drawing: dict[str, Drawing] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    files: "OrderedDict[str, tuple[float, str, bytes]]" = field(default_factory=OrderedDict)
    held: int = 0
    started: float = field(default_factory=time.time)


async def here(name: str, settings: Settings, observe: Callable[[int], None]) -> Drawing:
    """A model that draws in this process. Raises what `load` does."""
    pipe, pace = await asyncio.to_thread(_opened, settings.models[name])
    return Batcher(name, pipe, settings.batch_wait, settings.together, settings.queue, observe, pace)


def log_opened(models: list[str], broken: dict[str, str], address: str | None = None) -> None:
    """Says in the log which bundles are served, and why others are not."""
    for name, error in broken.items():
        tell("bundle cannot be served", f"{name} cannot be served: {error}", model=name, error=error)
    place = {} if address is None else {"address": address}
    people = f"serving {', '.join(models)}" + ("" if address is None else f" on {address} (Ctrl-C ends it)")
    tell("ready", people, models=models, broken=broken, **place)


def none_served(broken: dict[str, str]) -> BundleError:
    """What a server ends with that has nothing to serve."""
    return BundleError(f"no bundle can be served: {'; '.join(f'{name}: {error}' for name, error in broken.items())}")


def application(
    settings: Settings,
    open_model: Callable[..., Awaitable[Drawing]] = here,
    opened: Callable[[list[str], dict[str, str]], None] = log_opened,
) -> FastAPI:
    """The ASGI application. Its bundles are opened when it starts; one that is broken is told in the log and under /readyz.

    open_model(name, settings, observe): what draws a model's images; observe(images) is to be told of every call.
    opened(models, broken): told once which bundles are open, and why the others are not.
    """
    state, metrics = State(), Metrics()

    async def open_all() -> None:
        for name in settings.models:
            try:
                state.drawing[name] = await open_model(name, settings, metrics.batch.labels(name).observe)
            except Exception as error:
                state.broken[name] = str(error) if isinstance(error, SnoopiError) else f"{type(error).__name__}: {error}"
                continue
            metrics.watch(name, state.drawing[name])
        opened(list(state.drawing), state.broken)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Meanwhile a watchdog is answered: an engine may compile for minutes.
        loading = asyncio.create_task(open_all())
        yield
        loading.cancel()
        for drawing in state.drawing.values():
            await asyncio.to_thread(drawing.close)

    app = FastAPI(title="snoopi-rt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    # A watchdog, and the page, which asks for the key, need none; who has an image's address had it when it was drawn.
    free = ("/$", "/healthz$", "/readyz$", "/v1/images/files/", *(f"/{name}$" for name in PAGE))
    hosts = frozenset(filter(None, (*settings.hosts, *(urlsplit(origin).hostname for origin in settings.origins))))
    app.add_middleware(Around, key=settings.key, free=free, hosts=hosts, root=settings.root, metrics=metrics)
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"])

    @app.post("/v1/images/generations", openapi_extra={"requestBody": {"required": True, "content": schema.schema(schema.Generation)}})
    async def generations(request: Request) -> Response:
        """Draw images."""
        body = await read(request)
        try:
            asked = schema.generation(body)
            drawing, facts = find(asked.model), request.state.facts
            seeds, scales = asked.seeds_and_scales(settings.most)
            count, size = len(seeds), asked.height_and_width(drawing.pipe.bundle.sizes, settings.lenient)
            given = [asked.prompt] * count, [asked.negative_prompt] * count, scales, seeds
            facts |= {"model": drawing.name, "images": count}
            if settings.prompts_in_log:
                facts |= {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt}
            truncate = False
            try:
                images = drawing.pipe.check(*given, size=size)
            except PromptTooLong as error:
                truncate = settings.truncate if asked.truncate is None else asked.truncate
                if not truncate:
                    raise Refused(400, error.told('send "truncate": true')) from error
                images = drawing.pipe.check(*given, size=size, truncate=True)
        except InputError as error:
            raise Refused(400, str(error)) from error
        try:
            result = await unless_gone(request, drawing.draw(images, size, settings.timeout, truncate), settings.timeout)
        except QueueFull as error:
            metrics.refused.labels(drawing.name).inc()
            raise Refused(429, str(error), "rate_limit_error", {"retry-after": f"{error.seconds:.0f}"}) from error
        except (Cancelled, TimeoutError) as error:
            raise Refused(504, str(error) or f"no image within {settings.timeout:g} s", "timeout") from error
        except SnoopiError as error:
            facts["error"] = str(error)
            raise Refused(500, str(error), "server_error") from error
        metrics.images.labels(drawing.name).inc(count)
        for stage, seconds in result.timings.items():
            metrics.stages.labels(drawing.name, stage).observe(seconds)
        try:
            files = await asyncio.gather(*(asyncio.to_thread(schema.encoded, result, i, asked) for i in range(count)))
        except SnoopiError as error:
            raise Refused(400, str(error)) from error
        urls = [keep(request, asked.output_format, file) for file in files] if asked.formats()[1] else None
        return Response(
            schema.answer(drawing.name, result, files, urls, asked).model_dump_json(exclude_none=True), media_type="application/json"
        )

    @app.get("/v1/models", response_model=schema.Models)
    async def models() -> Any:
        """The bundles that are served; the first is the default."""
        return schema.Models(data=[described(name) for name in state.drawing])

    @app.get("/v1/models/{name}", response_model=schema.Model)
    async def model(name: str) -> Any:
        """One bundle."""
        return described(find(name).name)

    @app.get("/v1/images/files/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        """An image that was given as an address."""
        kept = state.files.get(name)
        if kept is None or time.monotonic() - kept[0] > KEPT_SECONDS:
            raise Refused(404, "no such image, or not any more", "not_found_error")
        return Response(kept[2], media_type=kept[1])

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> Response:
        return Response("alive\n", media_type="text/plain")

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        told = {**dict.fromkeys(settings.models, "loading"), **state.broken, **dict.fromkeys(state.drawing, "ready")}
        lines = [f"{name}: {what}" for name, what in told.items()]
        first = next(iter(settings.models))
        return Response("\n".join(lines) + "\n", 200 if first in state.drawing else 503, media_type="text/plain")

    @app.get("/metrics", include_in_schema=False)
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/{name}", include_in_schema=False)
    async def page(name: str) -> Response:
        """The web page's files; the page itself is at /."""
        if name not in PAGE:
            raise Refused(404, f"nothing is at /{name[:200]}", "not_found_error")
        return Response((FOLDER / name).read_bytes(), media_type=PAGE[name], headers=SAFE)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return await page("index.html")

    @app.exception_handler(404)
    async def nothing(request: Request, _: Exception) -> Response:
        return Refused(404, f"nothing is at {request.url.path[:200]}", "not_found_error").response()

    @app.exception_handler(405)
    async def another(request: Request, error: Exception) -> Response:
        allowed = getattr(error, "headers", None)
        return Refused(405, f"{request.method} is not for {request.url.path[:200]}", headers=allowed).response()

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error.response()

    def find(name: str | None) -> Drawing:
        known = name is not None and (name in settings.models or not settings.lenient)
        chosen = name if name is not None and known else next(iter(settings.models))
        return state.drawing[chosen] if chosen in state.drawing else missing(chosen)

    def missing(name: str) -> Any:
        if name in state.broken:
            raise Refused(503, f"model {name!r} cannot be served: {state.broken[name]}", "server_error")
        if name in settings.models:
            raise Refused(503, f"model {name!r} is still loading", "server_error", {"retry-after": "2"})
        raise Refused(404, f"unknown model {name[:200]!r}, choose from {', '.join(settings.models)}", "not_found_error")

    def described(name: str) -> schema.Model:
        drawing = state.drawing[name]
        pipe = drawing.pipe
        scale = pipe.bundle.guidance.scale
        return schema.Model(
            id=name,
            created=int(state.started),
            sizes=[f"{width}x{height}" for height, width in pipe.bundle.sizes],
            negative_prompts=pipe.bundle.guidance.kind != "none",
            negative_scale={"min": scale.min, "max": scale.max, "default": scale.default},
            engine=pipe.engine,
            max_images=settings.most,
            seconds_per_image=drawing.pace,
            vocabulary=pipe.bundle.vocabulary and replace(pipe.bundle.vocabulary, related=None),
            examples=pipe.bundle.examples,
            embedded=pipe.bundle.folder == EMBEDDED,
        )

    async def read(request: Request) -> bytes:
        """The body. Raises Refused for another type, too many bytes, and one that does not come."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(min(settings.timeout, 10)):
                async for part in request.stream():
                    body += part
                    if len(body) > settings.body:
                        raise Refused(413, f"the body is larger than {settings.body} bytes", headers={"connection": "close"})
        except TimeoutError as error:
            raise Refused(408, "the body did not come", headers={"connection": "close"}) from error
        except ClientDisconnect:
            raise Refused(499, "the client went") from None
        return bytes(body)

    def keep(request: Request, format: str, data: bytes) -> str:
        """Keeps an image for a while; its address."""
        name = f"{secrets.token_hex(16)}.{format}"
        state.files[name] = time.monotonic(), MEDIA[format], data
        state.held += len(data)
        while state.held > KEPT_BYTES and len(state.files) > 1:
            state.held -= len(state.files.popitem(last=False)[1][2])
        return str(request.url_for("file", name=name))

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            described = schema.Generation.model_json_schema(ref_template="#/components/schemas/{model}")
            document["components"]["schemas"] |= {"Generation": described} | {
                kind.__name__: kind.model_json_schema(ref_template="#/components/schemas/{model}")
                for kind in (schema.Images, schema.Drawn, schema.Failure, schema.Problem)
            }
            post = document["paths"]["/v1/images/generations"]["post"]
            post["responses"] = {"200": {"description": "The images.", "content": schema.schema(schema.Images)}} | {
                str(code): {"description": what, "content": schema.schema(schema.Failure)} for code, what in CODES.items()
            }
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _opened(open_pipeline: Callable[[], Pipeline]) -> tuple[Pipeline, float]:
    """The pipeline, warm, and its seconds per image: of a second image where that costs next to nothing."""
    pipe, seconds = open_pipeline().open(), 0.0
    for _ in range(2):
        start = time.monotonic()
        pipe.warmup()
        seconds = time.monotonic() - start
        if seconds > SLOW:
            break
    return pipe, seconds


async def unless_gone(request: Request, work: Awaitable[Any], timeout: float) -> Any:
    """The work's answer; it is cancelled when the client goes, and after the timeout (TimeoutError)."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        async with asyncio.timeout(timeout):
            return await task
    except asyncio.CancelledError:
        if asyncio.current_task().cancelling():  # type: ignore[union-attr]
            raise
        raise Refused(499, "the client went") from None
    finally:
        watching.cancel()


def read_key(file: Path | None, environment: str | None) -> str | None:
    """The API key: a file's first line, else the environment's. Raises InputError for an unreadable file, and a key that cannot be one."""
    if file is None and not environment:
        return None
    place = "$SNOOPI_RT_API_KEY" if file is None else str(file)
    try:
        text = (environment or "") if file is None else read_bounded(file, LONGEST_KEY).decode(errors="replace")
    except OSError as error:
        raise InputError(f"cannot read the key in {file}: {reason(error)}") from error
    key = text.strip().partition("\n")[0].strip()
    if not key:
        raise InputError(f"there is no key in {place}")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"the key in {place} must be one word of ASCII letters, digits and signs")
    return key
