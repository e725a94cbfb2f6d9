"""transformers: watch ``generate`` and continuous batching, stream, score given texts."""

from midstream.engines.hf.attachment import Attachment
from midstream.engines.hf.batching import BatchingAttachment
from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.engines.hf.halting import HaltingProcessor
from midstream.engines.hf.loading import ModelLoadError, load
from midstream.engines.hf.prompts import encode
from midstream.engines.hf.requests import GenerationFailedError, Request, Response
from midstream.engines.hf.scoring import TextScore, score
from midstream.engines.hf.streaming import stream

__all__ = [
    "Attachment",
    "BatchingAttachment",
    "GenerationFailedError",
    "HaltingProcessor",
    "ModelLoadError",
    "Request",
    "Response",
    "TextScore",
    "UnsupportedGenerationError",
    "encode",
    "load",
    "score",
    "stream",
]
