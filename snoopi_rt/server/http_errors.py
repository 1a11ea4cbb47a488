"""Answers that are not 200: what they mean, and their form, which is OpenAI's."""

from fastapi import Response

from snoopi_rt.server import schema

CODES = {
    400: "Something that cannot be asked.",
    401: "No key, or a wrong one.",
    404: "An unknown model.",
    408: "The body did not come.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    421: "Called by a name that is not this server's.",
    429: "Too many images wait; Retry-After says when to come back.",
    500: "A picture could not be made.",
    503: "A model that cannot be served, or not yet.",
    504: "No image within the time.",
}


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, code: int, message: str, kind: str = "invalid_request_error", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.code, self.kind, self.headers = code, kind, headers or {}

    def response(self) -> Response:
        """In OpenAI's form."""
        failure = schema.Failure(error=schema.Problem(message=str(self), type=self.kind, code=str(self.code)))
        return Response(failure.model_dump_json(), self.code, self.headers, "application/json")
