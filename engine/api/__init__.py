"""The OpenAI-compatible HTTP API of the engine process."""
