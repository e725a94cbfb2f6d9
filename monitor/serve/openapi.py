"""The OpenAPI document: what is taken, and every way it is answered."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from midstream.serve.settings import Settings


def describe(app: FastAPI, models: Sequence[str], settings: Settings) -> None:
    """Give the application its document."""
