"""SGLang: watch through forward hooks, halt through a custom logit processor.

Written from SGLang's documentation and sources, tested against stand-ins of the seams it uses, and
never run against the real engine; `docs/engines.md` says what it takes, and what it refuses.
"""

from midstream.engines.sglang.arguments import UnsupportedEngineError, server_arguments
from midstream.engines.sglang.requests import Front, watched

__all__ = ["Front", "UnsupportedEngineError", "server_arguments", "watched"]
