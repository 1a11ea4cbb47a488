"""Text encoders: prompts to token states, as modules that can be exported."""
