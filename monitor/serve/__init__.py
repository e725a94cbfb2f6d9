"""The service: an OpenAI-compatible endpoint whose streams are watched (docs/serve.md)."""
