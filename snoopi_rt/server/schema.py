"""Requests and responses in the form of OpenAI's image API; the OpenAPI document is generated from these classes."""

import base64
import time
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from snoopi_rt.bundle.manifest import Vocabulary
from snoopi_rt.errors import InputError
from snoopi_rt.json_reader import parse_json
from snoopi_rt.request import MAX_CHARACTERS, MAX_IMAGES, SEEDS, check_seed, nearest_size, parse_size, seeds_from
from snoopi_rt.result import Result

UNUSED = "Accepted and ignored: many clients always send it."


class CreateImageRequest(BaseModel):
    """The body of POST /v1/images/generations. Unknown fields are refused: ignoring them silently would look like support."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=MAX_CHARACTERS, description="What to draw.")
    model: str | None = Field(None, max_length=200, description="A bundle's name; by default the first.")
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Number of images; image i uses seed + i.")
    size: str | None = Field(None, max_length=20, description="WIDTHxHEIGHT, one of the model's sizes; auto means its first.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="By default b64_json, and both for clients made for DALL-E."
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp; by default 95.")
    user: str | None = Field(None, max_length=256, description=UNUSED)
    safety_identifier: str | None = Field(None, max_length=256, description=UNUSED)
    seed: Annotated[int, Field(ge=0, lt=SEEDS), BeforeValidator(check_seed)] | None = Field(
        None, description="By default a random one, which the answer contains."
    )
    negative_prompt: str | None = Field(None, max_length=MAX_CHARACTERS, description="What not to draw.")
    negative_scale: float | list[float] | None = Field(
        None, description="Strength of the negative prompt; a list draws every image once per scale, with the same seed."
    )
    truncate: bool | None = Field(None, description="Cut prompts that are too long; by default as the server's --truncate says.")
    quality: Literal["auto", "standard"] | None = Field(None, description=UNUSED)
    style: Literal["vivid", "natural"] | None = Field(None, description=UNUSED)
    background: Literal["auto", "opaque"] | None = Field(None, description=UNUSED)
    moderation: Literal["auto", "low"] | None = Field(None, description=UNUSED)
    stream: Literal[False] | None = Field(None, description=UNUSED)
    partial_images: Literal[0] | None = Field(None, description=UNUSED)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """Drops nulls, which count as not given: OpenAI's clients send them for every field that is not set."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _check_compression(self) -> Self:
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise ValueError("output_compression is for jpeg and webp: png is lossless")
        return self

    def seeds_and_scales(self, max_images: int) -> tuple[list[int], list[float | None]]:
        """The seed and the scale of every image, seed by seed. Raises InputError for more than `max_images` images."""
        scales = self.negative_scale if isinstance(self.negative_scale, list) else [self.negative_scale]
        if not scales:
            raise InputError("negative_scale is an empty list")
        if self.n * len(scales) > max_images:
            raise InputError(f"{self.n * len(scales)} images in one request, at most {max_images} are drawn")
        return [seed for seed in seeds_from(self.seed, self.n) for _ in scales], list(scales) * self.n

    def height_and_width(self, sizes: tuple[tuple[int, int], ...], lenient: bool) -> tuple[int, int]:
        """The size, by default the model's first; if `lenient`, the nearest of the model's. Raises InputError for a malformed one."""
        if self.size is None or self.size.lower() == "auto":
            return sizes[0]
        size = parse_size(self.size)
        return nearest_size(size, sizes) if lenient else size

    def formats(self) -> tuple[bool, bool]:
        """Whether images are returned as base64, and as URLs.

        DALL-E returned URLs by default, and clients made for it (LangChain, LibreChat) read nothing else; they are recognised by fields
        that no later model has.
        """
        if self.response_format is None:
            return True, self.style is not None or self.quality == "standard"
        return self.response_format == "b64_json", self.response_format == "url"


class Image(BaseModel):
    """One image of an answer, with its seed and scale."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    negative_scale: float | None = None


class ImagesResponse(BaseModel):
    """The answer to a CreateImageRequest."""

    created: int = Field(description="Seconds since 1970.")
    data: list[Image]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    model: str
    truncated: bool = Field(description="Whether a prompt was cut.")
    warnings: list[str] = Field(description="Why the images may not show what the prompt asks for.")
    timings: dict[str, float] = Field(description="Seconds per stage of the batch in which the images were drawn.")


class Model(BaseModel):
    """A bundle."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["snoopi-rt"] = "snoopi-rt"
    sizes: list[str]
    negative_prompts: bool
    negative_scale: dict[str, float]
    engine: str
    max_images: int = Field(description="Images per request.")
    seconds_per_image: float | None = Field(description="A moving average; null if not measured.")
    vocabulary: Vocabulary | None = Field(description="What a narrow model can draw; null means anything.")
    examples: tuple[str, ...] = Field(description="Prompts that show the model well.")
    embedded: bool = Field(description="Whether it is the bundle that ships with snoopi-rt.")


class ListModelsResponse(BaseModel):
    """All bundles that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Error(BaseModel):
    """An error in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of an error."""

    error: Error


def parse_body(body: bytes) -> CreateImageRequest:
    """The request in a body. Raises InputError, in one line that names the field."""
    try:
        return CreateImageRequest.model_validate(parse_json(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("float", "list[")))
        message = first["msg"].removeprefix("Value error, ").removeprefix(f"{place} ").replace("Input should", "it must")
        if first["type"] == "extra_forbidden":
            message = f"unknown field, choose from {', '.join(CreateImageRequest.model_fields)}"
        elif first["type"] == "model_type":
            message = "the body must be a JSON object"
        elif first["type"] == "literal_error":
            message = message.replace("False", "false")  # in JSON's words
        raise InputError(f"{' '.join(place.split())[:100]}: {message}" if place else message) from error
    except ValueError as error:
        raise InputError(f"the body is not valid JSON: {error}") from error


def answer(model: str, result: Result, files: list[bytes], urls: list[str] | None, request: CreateImageRequest) -> ImagesResponse:
    """The images as base64, as URLs, or as both."""
    as_base64, _ = request.formats()
    height, width = result.images.shape[1:3]
    data = [
        Image(
            b64_json=base64.b64encode(file).decode() if as_base64 else None,
            url=None if urls is None else urls[i],
            seed=drawn.seed,
            negative_scale=drawn.negative_scale,
        )
        for i, (file, drawn) in enumerate(zip(files, result.requests, strict=True))
    ]
    size = f"{width}x{height}"
    timings = {stage: round(seconds, 6) for stage, seconds in result.timings.items()}
    return ImagesResponse(
        created=int(time.time()),
        data=data,
        output_format=request.output_format,
        size=size,
        model=model,
        truncated=result.truncate,
        warnings=list(result.warnings),
        timings=timings,
    )


def reference(model: type[BaseModel]) -> dict[str, Any]:
    """A reference to a class in the OpenAPI document."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
