"""Negative prompts for one-step pipelines of diffusers: `pipe = snoopi_rt.diffusers.with_negative(pipe)`. Needs the extra diffusers."""

from snoopi_rt.export.pipelines import with_negative, without_negative

__all__ = ["with_negative", "without_negative"]
