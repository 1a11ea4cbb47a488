"""Negative prompts in pipelines of diffusers, which draw in PyTorch: nothing here is exported."""
