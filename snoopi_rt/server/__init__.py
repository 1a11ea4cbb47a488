"""The HTTP server (extra `serve`): the Pipeline's own call in OpenAI's words, with micro-batching, limits and metrics."""
