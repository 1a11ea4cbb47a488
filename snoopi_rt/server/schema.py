"""What a client may ask for and what it gets, in the words of OpenAI's image API; the OpenAPI document is made of these classes."""

import base64
import time
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from snoopi_rt import image
from snoopi_rt.bundle.manifest import Vocabulary
from snoopi_rt.errors import InputError
from snoopi_rt.json_reader import parse_json
from snoopi_rt.request import MAX_CHARACTERS, MAX_IMAGES, SEEDS, check_seed, nearest_size, parse_size, seeds_from
from snoopi_rt.result import Result

UNUSED = "Taken and not used: clients send it unasked."


class Generation(BaseModel):
    """The body of POST /v1/images/generations. A field that is not here is refused: silence would look like obedience."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=MAX_CHARACTERS, description="What to draw.")
    model: str | None = Field(None, max_length=200, description="A bundle's name; the first one where none is given.")
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Images; image i uses seed + i.")
    size: str | None = Field(None, max_length=20, description="WIDTHxHEIGHT, one of the model's; auto is its first.")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json by default; both for DALL-E's clients.")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="The quality of jpeg and webp, by default 95.")
    user: str | None = Field(None, max_length=256, description=UNUSED)
    safety_identifier: str | None = Field(None, max_length=256, description=UNUSED)
    seed: Annotated[int, Field(ge=0, lt=SEEDS), BeforeValidator(check_seed)] | None = Field(
        None, description="None draws one, which the answer says."
    )
    negative_prompt: str | None = Field(None, max_length=MAX_CHARACTERS, description="What not to draw.")
    negative_scale: float | list[float] | None = Field(
        None, description="How strongly it counts; a list draws every image once for each, with the same seed."
    )
    truncate: bool | None = Field(None, description="Cut prompts that are too long; by default the server's --truncate.")
    quality: Literal["auto", "standard"] | None = Field(None, description=UNUSED)
    style: Literal["vivid", "natural"] | None = Field(None, description=UNUSED)
    background: Literal["auto", "opaque"] | None = Field(None, description=UNUSED)
    moderation: Literal["auto", "low"] | None = Field(None, description=UNUSED)
    stream: Literal[False] | None = Field(None, description=UNUSED)
    partial_images: Literal[0] | None = Field(None, description=UNUSED)

    @model_validator(mode="before")
    @classmethod
    def _not_given(cls, body: Any) -> Any:
        """OpenAI's clients say null for what they do not say."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise ValueError("output_compression is for jpeg and webp: png keeps every pixel")
        return self

    def seeds_and_scales(self, most: int) -> tuple[list[int], list[float | None]]:
        """One of each for every image, seed by seed. Raises InputError for more than `most` images."""
        scales = self.negative_scale if isinstance(self.negative_scale, list) else [self.negative_scale]
        if not scales:
            raise InputError("negative_scale is an empty list")
        if self.n * len(scales) > most:
            raise InputError(f"{self.n * len(scales)} images in one request, at most {most} are drawn")
        return [seed for seed in seeds_from(self.seed, self.n) for _ in scales], list(scales) * self.n

    def height_and_width(self, sizes: tuple[tuple[int, int], ...], lenient: bool) -> tuple[int, int]:
        """The size, the first of the model's where none is given; the nearest of them where `lenient`. Raises InputError for no size."""
        if self.size is None or self.size.lower() == "auto":
            return sizes[0]
        size = parse_size(self.size)
        return nearest_size(size, sizes) if lenient else size

    def formats(self) -> tuple[bool, bool]:
        """Whether images are given as base64, and as addresses.

        DALL-E's default were addresses, and clients made for it (LangChain, LibreChat) read nothing else; they are told by fields that
        no later model has.
        """
        if self.response_format is None:
            return True, self.style is not None or self.quality == "standard"
        return self.response_format == "b64_json", self.response_format == "url"


class Drawn(BaseModel):
    """One image of an answer, and what draws it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    negative_scale: float | None = None


class Images(BaseModel):
    """The answer to a Generation."""

    created: int = Field(description="Seconds since 1970.")
    data: list[Drawn]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    model: str
    truncated: bool = Field(description="Whether a prompt was cut.")
    warnings: list[str] = Field(description="Why the images may not show what was asked for.")
    timings: dict[str, float] = Field(description="Seconds by stage, of the batch that the images were drawn in.")


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
    max_images: int = Field(description="Of one request.")
    seconds_per_image: float | None = Field(description="Of late; null where it was not measured.")
    vocabulary: Vocabulary | None = Field(description="What a narrow model knows; null: anything.")
    examples: tuple[str, ...] = Field(description="Prompts that show the model well.")
    embedded: bool = Field(description="Whether it is the bundle that comes with snoopi-rt.")


class Models(BaseModel):
    """All bundles that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Problem(BaseModel):
    """Why there is no image, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    """The body of every answer that is not 200."""

    error: Problem


def generation(body: bytes) -> Generation:
    """The request in a body. Raises InputError, in one line that names the field."""
    try:
        return Generation.model_validate(parse_json(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("float", "list[")))
        message = first["msg"].removeprefix("Value error, ").removeprefix(f"{place} ").replace("Input should", "it must")
        if first["type"] == "extra_forbidden":
            message = f"unknown field, known are {', '.join(Generation.model_fields)}"
        elif first["type"] == "model_type":
            message = "the body must be a JSON object"
        elif first["type"] == "literal_error":
            message = message.replace("False", "false")  # in JSON's words
        raise InputError(f"{' '.join(place.split())[:100]}: {message}" if place else message) from error
    except ValueError as error:
        raise InputError(f"the body is not a request in JSON: {error}") from error


def encoded(result: Result, index: int, asked: Generation) -> bytes:
    """The file of one image, with what draws it again inside."""
    return image.encode(
        result.images[index],
        asked.output_format,
        result.metadata(index),
        95 if asked.output_compression is None else asked.output_compression,
    )


def answer(model: str, result: Result, files: list[bytes], urls: list[str] | None, asked: Generation) -> Images:
    """The images as base64, as addresses (`urls`), or as both."""
    inside, _ = asked.formats()
    height, width = result.images.shape[1:3]
    data = [
        Drawn(
            b64_json=base64.b64encode(file).decode() if inside else None,
            url=None if urls is None else urls[i],
            seed=request.seed,
            negative_scale=request.negative_scale,
        )
        for i, (file, request) in enumerate(zip(files, result.requests, strict=True))
    ]
    size = f"{width}x{height}"
    timings = {stage: round(seconds, 6) for stage, seconds in result.timings.items()}
    return Images(
        created=int(time.time()),
        data=data,
        output_format=asked.output_format,
        size=size,
        model=model,
        truncated=result.truncated,
        warnings=list(result.warnings),
        timings=timings,
    )


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """Where a class stands in the OpenAPI document."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
