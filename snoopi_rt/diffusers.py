"""Negative prompts for few-step pipelines of diffusers: `pipe = with_negative(pipe)`. Needs the extra diffusers."""

from typing import Any, TypeVar

from snoopi_rt.errors import PackageMissing, how_to_install

Pipeline = TypeVar("Pipeline")


def with_negative(pipe: Pipeline, kind: str = "nasa") -> Pipeline:
    """The same pipeline, which from now on heeds `negative_prompt` without classifier-free guidance: one call of its network per step.

    Its call also takes `negative_scale`, one number or one per prompt; by default the kind's. kind: nasa, nag, vsf or projected, and in
    joint attention (SD3, FLUX, FLUX.2, Z-Image) nasa, nag, vsf or gated. Without a negative prompt (None or blank), or at a scale of 0, it
    draws what it drew before, bit for bit; a scale without a negative prompt is an InputError. Raises InputError for another kind and for a
    pipeline without such attention to a text; PackageMissing if torch or diffusers is missing.
    """
    return _code().with_negative(pipe, kind)


def without_negative(pipe: Pipeline) -> Pipeline:
    """The pipeline as it was before `with_negative`; one that never was is left alone."""
    return _code().without_negative(pipe)


def _code() -> Any:
    try:
        from snoopi_rt.export.torchvision_operators import import_torchvision

        import_torchvision()
        from snoopi_rt.export.pipelines import negative_prompts
    except PackageMissing:
        raise
    except ImportError as error:
        raise PackageMissing(f"negative prompts in diffusers need {error.name}: {how_to_install('diffusers')}") from error
    return negative_prompts
