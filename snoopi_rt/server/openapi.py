"""The OpenAPI document. The body of POST /v1/images/generations is parsed by hand, so it and the answers are described by hand, too."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from snoopi_rt.server import schema
from snoopi_rt.server.http_errors import STATUS_CODES

TEMPLATE = "#/components/schemas/{model}"
DESCRIBED = (schema.CreateImageRequest, schema.ImagesResponse, schema.Image, schema.ErrorResponse, schema.Error)


def document(app: FastAPI) -> dict[str, Any]:
    """The document of all routes; made once."""
    if app.openapi_schema is None:
        openapi = get_openapi(title=app.title, version=app.version, routes=app.routes)
        openapi["components"]["schemas"] |= {model.__name__: model.model_json_schema(ref_template=TEMPLATE) for model in DESCRIBED}
        openapi["paths"]["/v1/images/generations"]["post"]["responses"] = {
            "200": {"description": "The images.", "content": schema.reference(schema.ImagesResponse)},
            **{
                str(status): {"description": description, "content": schema.reference(schema.ErrorResponse)}
                for status, description in STATUS_CODES.items()
            },
        }
        app.openapi_schema = openapi
    return app.openapi_schema
