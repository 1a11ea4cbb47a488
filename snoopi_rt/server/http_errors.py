"""Errors as HTTP responses in OpenAI's form, and what their status codes mean."""

from typing import Any

from fastapi import Request, Response

from snoopi_rt.server import schema

STATUS_CODES = {
    400: "The request is invalid.",
    401: "The API key is missing or wrong.",
    404: "The model is unknown.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    421: "The server was called by a name that is not its own.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The image could not be drawn.",
    503: "The model is broken, or still loading.",
    504: "The image was not drawn in time.",
}


class HttpError(Exception):
    """An answer other than 200. `type` is OpenAI's word for the kind of error."""

    def __init__(self, status: int, message: str, type: str = "invalid_request_error", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.type, self.headers = status, type, headers or {}

    def response(self) -> Response:
        """The answer in OpenAI's form."""
        body = schema.ErrorResponse(error=schema.Error(message=str(self), type=self.type, code=str(self.status)))
        return Response(body.model_dump_json(), self.status, self.headers, "application/json")


async def _not_found(request: Request, _: Exception) -> Response:
    return HttpError(404, f"nothing is at {request.url.path[:200]}", "not_found_error").response()


async def _method_not_allowed(request: Request, error: Exception) -> Response:
    headers = getattr(error, "headers", None)
    return HttpError(405, f"{request.url.path[:200]} does not take {request.method}", headers=headers).response()


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.response()


HANDLERS: dict[Any, Any] = {404: _not_found, 405: _method_not_allowed, HttpError: _http_error}
"""The application's exception handlers."""
