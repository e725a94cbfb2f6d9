"""The OpenAPI document: what is taken, and every way it is answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from midstream.serve.requests import ChatRequest, CompletionRequest
from midstream.serve.responses import Facts
from midstream.serve.settings import Settings

_REFS = "#/components/schemas/{model}"
_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
_REFUSALS = {
    400: "The request cannot be served: `error.param` and `error.code` say why.",
    401: "No valid API key.",
    404: "No such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body does not say that it is JSON.",
    429: "Too many requests are being answered; Retry-After says when to try again.",
    500: "The engine failed.",
    503: "Not ready, or shutting down; Retry-After says when to try again.",
    504: "The response took too long.",
}
_EVENT = {
    "description": "A chunk, or an error object; the last event's data is [DONE].",
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}


class ErrorFacts(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """The standard error object."""

    error: ErrorFacts


class Choice(BaseModel):
    """The one choice of a response; Azure's annotations beside it where asked for.

    ``stop_reason`` is there where it was halted, and the policy has a message for that.
    """

    index: int
    finish_reason: str
    stop_reason: str | None = None


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """A whole response."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    midstream: Facts | None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that are served."""

    object: str
    data: list[ModelCard]


class Status(BaseModel):
    """How the server is."""

    status: str
    reason: str | None = None


_ANSWERS: dict[str, dict[int, type[BaseModel]]] = {
    "/v1/chat/completions": {200: Completion},
    "/v1/completions": {200: Completion},
    "/v1/models": {200: ModelList},
    "/v1/models/{name}": {200: ModelCard},
    "/health": {200: Status},
    "/ready": {200: Status, 503: Status},
}
_REFUSED: dict[str, Sequence[int]] = {
    **dict.fromkeys(_BODIES, tuple(_REFUSALS)),
    "/v1/models": (401,),
    "/v1/models/{name}": (401, 404),
}


def describe(app: FastAPI, models: Sequence[str], settings: Settings) -> None:
    """Give the application its document.

    Parameters
    ----------
    app : FastAPI
    models : sequence of str
        Names that are served.
    settings : Settings
        Its limits are those of the document.
    """
    generate = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate(), models, settings)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(found: dict[str, Any], models: Sequence[str], settings: Settings) -> None:
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(_schemas(models, settings))
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, answers in _ANSWERS.items():
        for operation in found["paths"][path].values():
            responses = {
                str(status): _response(kind.__name__, f"{kind.__doc__}")
                for status, kind in answers.items()
            }
            for status in _REFUSED.get(path, ()):
                responses[str(status)] = _response("Error", _REFUSALS[status])
            operation["responses"] = responses
            if path in _BODIES:
                responses["200"]["content"]["text/event-stream"] = {"itemSchema": _EVENT}
                body = {"schema": {"$ref": _REFS.format(model=_BODIES[path].__name__)}}
                operation["requestBody"] = {
                    "required": True,
                    "content": {"application/json": body},
                }
            if path in _REFUSED:
                operation["security"] = [{"key": []}, {}]


def _schemas(models: Sequence[str], settings: Settings) -> dict[str, Any]:
    kinds: list[type[BaseModel]] = [*_BODIES.values(), Error, Completion, ModelList, Status]
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=_REFS
    )
    schemas: dict[str, Any] = definitions["$defs"]
    for kind in _BODIES.values():
        fields = schemas[kind.__name__]["properties"]
        fields["model"] = {"type": "string", "enum": list(models)}
        for name in ("max_tokens", "max_completion_tokens"):
            if name in fields:
                fields[name]["anyOf"][0]["maximum"] = settings.max_tokens
        for name in settings.sent_on:
            fields[name] = {}
    schemas["ChatRequest"]["properties"]["messages"]["maxItems"] = settings.max_messages
    if not settings.conversations:
        schemas["Midstream"]["properties"]["conversation"] = {"type": "null"}
    return schemas


def _response(schema: str, description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": _REFS.format(model=schema)}}},
    }
