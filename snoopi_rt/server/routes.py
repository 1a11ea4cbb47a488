"""The routes of the server. A new one is a function here; its state is `request.app.state`."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from snoopi_rt.bundle.tokenizer import PromptTooLong
from snoopi_rt.errors import Cancelled, InputError, SnoopiError
from snoopi_rt.request import Request as ImageRequest
from snoopi_rt.result import Result
from snoopi_rt.server import schema
from snoopi_rt.server.batcher import QueueFull, ServedModel
from snoopi_rt.server.http_errors import HttpError

BODY_SECONDS = 10.0
"""Seconds in which a request's body must have arrived."""
PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {"index.html": "text/html; charset=utf-8", "page.css": "text/css"} | dict.fromkeys(
    ("page.js", "images.js", "ideas.js", "history.js", "words.js"), "text/javascript"
)
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
PUBLIC_PATHS = ("/$", "/healthz$", "/readyz$", "/v1/images/files/", *(f"/{name}$" for name in PAGE_TYPES))
"""Paths that need no key, by their beginnings; a whole path ends in "$". Health checks, the page, which asks for the key itself, and
image URLs, which are unguessable."""
router = APIRouter()


@router.post(
    "/v1/images/generations", openapi_extra={"requestBody": {"required": True, "content": schema.reference(schema.CreateImageRequest)}}
)
async def generations(request: Request) -> Response:
    """Draw images."""
    settings, metrics = request.app.state.settings, request.app.state.metrics
    body = await _read_body(request, settings.max_body, min(settings.timeout, BODY_SECONDS))
    try:
        parameters = schema.parse_body(body)
        model = request.app.state.models.find(parameters.model)
        fields = request.state.log_fields
        fields["model"] = model.name
        if settings.log_prompts:
            fields |= {"prompt": parameters.prompt, "negative_prompt": parameters.negative_prompt}
        size = parameters.height_and_width(model.pipe.bundle.sizes, settings.lenient)
        requests, truncate = _requests(parameters, model, size, settings.max_images, settings.truncate)
        fields["images"] = len(requests)
    except InputError as error:
        raise HttpError(400, str(error)) from error
    try:
        work = model.draw(requests, size, settings.timeout, truncate)
        result = await _unless_disconnected(request, work, settings.timeout)
    except QueueFull as error:
        metrics.refused.labels(model.name).inc()
        raise HttpError(429, str(error), "rate_limit_error", {"retry-after": f"{error.seconds:.0f}"}) from error
    except (Cancelled, TimeoutError) as error:
        raise HttpError(504, str(error) or f"no image within {settings.timeout:g} s", "timeout") from error
    except SnoopiError as error:
        fields["error"] = str(error)
        raise HttpError(500, str(error), "server_error") from error
    metrics.images.labels(model.name).inc(len(result))
    quality = 95 if parameters.output_compression is None else parameters.output_compression
    try:
        encoded = await asyncio.gather(*(asyncio.to_thread(one.encode, parameters.output_format, quality) for one in result))
        files = [file for one in encoded for file in one]
        urls = [_url(request, file, parameters.output_format) for file in files] if parameters.formats()[1] else None
    except SnoopiError as error:
        raise HttpError(400, str(error)) from error
    answer = schema.answer(model.name, result, files, urls, parameters)
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


@router.get("/v1/models", response_model=schema.ListModelsResponse)
async def models(request: Request) -> Any:
    """The bundles that are served; the first is the default."""
    return schema.ListModelsResponse(data=request.app.state.models.describe_all())


@router.get("/v1/models/{name}", response_model=schema.Model)
async def model(request: Request, name: str) -> Any:
    """One bundle."""
    return request.app.state.models.describe(name)


@router.get("/v1/images/files/{name}", include_in_schema=False)
async def image_file(request: Request, name: str) -> Response:
    """An image that was returned as a URL."""
    stored = request.app.state.images.get(name)
    if stored is None:
        raise HttpError(404, "no such image, or it has expired", "not_found_error")
    return Response(stored[0], media_type=stored[1])


@router.get("/healthz", include_in_schema=False)
async def healthz() -> Response:
    """Whether the process answers."""
    return Response("alive\n", media_type="text/plain")


@router.get("/readyz", include_in_schema=False)
async def readyz(request: Request) -> Response:
    """Whether the default model is open, and the state of each."""
    models = request.app.state.models
    lines = [f"{name}: {status}\n" for name, status in models.status().items()]
    return Response("".join(lines), 200 if models.is_ready else 503, media_type="text/plain")


@router.get("/metrics", include_in_schema=False)
async def prometheus(request: Request) -> Response:
    """All metrics in Prometheus' text format."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/{name}", include_in_schema=False)
async def page(name: str) -> Response:
    """The web page's files; the page itself is at /."""
    if name not in PAGE_TYPES:
        raise HttpError(404, f"nothing is at /{name[:200]}", "not_found_error")
    return Response((PAGE / name).read_bytes(), media_type=PAGE_TYPES[name], headers=PAGE_HEADERS)


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """The web page."""
    return await page("index.html")


def _requests(
    parameters: schema.CreateImageRequest, model: ServedModel, size: tuple[int, int], max_images: int, truncate: bool
) -> tuple[list[ImageRequest], bool]:
    """What is to be drawn, and whether its prompts must be cut. Raises InputError; HttpError for a prompt that is too long."""
    seeds, scales = parameters.seeds_and_scales(max_images)
    columns = [parameters.prompt] * len(seeds), [parameters.negative_prompt] * len(seeds), scales, seeds
    try:
        return model.pipe.check(*columns, size=size), False
    except PromptTooLong as error:
        if not (truncate if parameters.truncate is None else parameters.truncate):
            raise HttpError(400, error.with_remedy('send "truncate": true')) from error
        return model.pipe.check(*columns, size=size, truncate=True), True


async def _read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body. Raises HttpError for another content type, more than `limit` bytes, and one that does not arrive within `seconds`."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HttpError(415, "the body must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise HttpError(413, f"the body is larger than {limit} bytes", headers={"connection": "close"})
    except TimeoutError as error:
        raise HttpError(408, "the body did not arrive in time", headers={"connection": "close"}) from error
    except ClientDisconnect:
        raise HttpError(499, "the client disconnected") from None
    return bytes(body)


async def _unless_disconnected(request: Request, work: Awaitable[Result], timeout: float) -> Result:
    """The result of the work, which is cancelled when the client disconnects, and after the timeout (TimeoutError)."""
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
        raise HttpError(499, "the client disconnected") from None
    finally:
        watching.cancel()


def _url(request: Request, file: bytes, format: str) -> str:
    """The URL under which an encoded image stays for a while. Raises InputError for one that is too large."""
    return str(request.url_for("image_file", name=request.app.state.images.add(file, format)))
