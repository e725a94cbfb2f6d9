"""transformers: watch ``generate``, stream one response, score given texts."""

from midstream.engines.hf.attachment import Attachment, HaltingProcessor
from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.engines.hf.loading import ModelLoadError, load
from midstream.engines.hf.scoring import TextScore, score
from midstream.engines.hf.streaming import encode, stream

__all__ = [
    "Attachment",
    "HaltingProcessor",
    "ModelLoadError",
    "TextScore",
    "UnsupportedGenerationError",
    "encode",
    "load",
    "score",
    "stream",
]
