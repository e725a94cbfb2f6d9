"""A small language whose harm process is known exactly, its model and its Bayes oracle.

>>> from midstream import testbed
>>> model, tokenizer = testbed.load()
>>> prompts = [testbed.sample_prompt(0, i) for i in range(4)]
>>> responses = testbed.generate_responses(model, prompts, seed=0)
>>> labels = [testbed.label(p, r) for p, r in zip(prompts, responses)]
>>> readings = testbed.Oracle().read(prompts, responses, horizons=(0, 24))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .baseline import BagOfWords, bag_of_words
from .conversation_oracle import ConversationOracle, opening_chance
from .conversations import (
    Conversation,
    ConversationLabels,
    Turn,
    conversation_labels,
    conversation_rows,
    rollout,
    sample_conversation,
    sample_conversations,
    sample_user,
)
from .corpus import corpus_rows, write_corpus
from .event_oracle import EventProcess, EventReading
from .grammar import EOS_ID, STATES, VOCABULARY, describe
from .language import (
    Dialogue,
    Labels,
    Prompt,
    horizon_labels,
    label,
    read_prompt,
    sample_dialogue,
    sample_dialogues,
    sample_prompt,
    text_of,
    violating_index,
)
from .oracle import Oracle, Reading
from .trace_oracle import TraceOracle
from .traces import sample_trace, sample_traces, trace_rows, violating_step

if TYPE_CHECKING:
    from midstream.bundle import Bundle

    from .generate import generate_responses
    from .train import build_model

#: The model that ships with the package, and the bundle made for it.
MODEL_DIR = Path(__file__).parent / "model"
BUNDLE_DIR = Path(__file__).parent / "bundle"

#: What the archive's tools do, as rules for `midstream.agents.rules.Rules.load`.
AGENT_RULES = Path(__file__).parent / "agent_rules.yaml"

__all__ = [
    "AGENT_RULES",
    "BUNDLE_DIR",
    "EOS_ID",
    "MODEL_DIR",
    "STATES",
    "VOCABULARY",
    "BagOfWords",
    "Conversation",
    "ConversationLabels",
    "ConversationOracle",
    "Dialogue",
    "EventProcess",
    "EventReading",
    "Labels",
    "Oracle",
    "Prompt",
    "Reading",
    "TraceOracle",
    "Turn",
    "bag_of_words",
    "build_model",
    "conversation_labels",
    "conversation_rows",
    "corpus_rows",
    "describe",
    "generate_responses",
    "horizon_labels",
    "label",
    "load",
    "load_bundle",
    "opening_chance",
    "read_prompt",
    "rollout",
    "sample_conversation",
    "sample_conversations",
    "sample_dialogue",
    "sample_dialogues",
    "sample_prompt",
    "sample_trace",
    "sample_traces",
    "sample_user",
    "text_of",
    "trace_rows",
    "violating_index",
    "violating_step",
    "write_corpus",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; the language and the oracle need neither.
    if name == "build_model":
        from .train import build_model

        return build_model
    if name == "generate_responses":
        from .generate import generate_responses

        return generate_responses
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(folder: str | Path = MODEL_DIR) -> tuple[Any, Any]:
    """The testbed's model and tokenizer, from a folder on disk, never from the network.

    Parameters
    ----------
    folder : path
        Where `build_model` wrote them; by default the ones in the package.

    Returns
    -------
    model : LlamaForCausalLM
        In evaluation mode, fp32, on the CPU.
    tokenizer : PreTrainedTokenizerFast

    Raises
    ------
    FileNotFoundError
        If the folder holds no model; the message says how to build one.
    """
    from midstream.engines.hf.loading import load as load_model

    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no testbed model in {folder}; `midstream testbed build --out DIR` makes DIR/model"
        )
    return load_model(folder)


def load_bundle(folder: str | Path = BUNDLE_DIR) -> Bundle:
    """Probes, chain and policy for the testbed's model.

    Raises
    ------
    BundleError
        If the folder holds no whole bundle.
    """
    from midstream.bundle import Bundle

    return Bundle.load(folder)
