"""midstream: a streaming, token-level safety monitor for language models."""
