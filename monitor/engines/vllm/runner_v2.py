"""vLLM's newer model runner (``v1/worker/gpu/model_runner.py``), by auxiliary hidden states.

They are what EAGLE-3 drafts from: the model returns the residual stream of chosen layers, and CUDA
graphs copy it to buffers of their own, so that it is there after a replay, too. Entry i is the
stream before layer i, and after layer i - 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from midstream.engines.vllm.model import Read
from midstream.engines.vllm.runner import Batch
from midstream.engines.vllm.settings import UnsupportedEngineError
from midstream.taps import Tap, decoder_layers


class AuxiliaryRunner:
    """Reads the auxiliary hidden states between ``execute_model`` and ``sample_tokens``.

    Parameters
    ----------
    runner : GPUModelRunner
        With its model loaded, neither compiled nor captured.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._taps: dict[Tap, int] = {}

    def attach(self, taps: tuple[Tap, ...], read: Read) -> None:
        """Make the model return the tapped layers.

        Raises
        ------
        UnsupportedEngineError
            Where the model cannot, something else makes it do so already, or for a site or a layer
            that is not there.
        """
        from vllm.model_executor.models.interfaces import supports_eagle3

        runner = self._runner
        model = runner.get_model()
        name = type(model).__name__
        if not supports_eagle3(model):
            raise UnsupportedEngineError(
                f"{name} does not declare SupportsEagle3, so the newer model runner cannot read "
                "its layers; serve a model whose class does, or use the older runner "
                "(VLLM_USE_V2_MODEL_RUNNER=0) with --enforce-eager"
            )
        if runner.use_aux_hidden_state_outputs:
            raise UnsupportedEngineError(
                "the model returns auxiliary hidden states for something else already: two plugins "
                "want the same seam; leave the other one out"
            )
        layers = len(decoder_layers(model))
        for tap in taps:
            if tap.site == "resid_mid" or tap.layer >= layers:
                raise UnsupportedEngineError(
                    f"no tap {tap}: {name} returns resid_pre and resid_post of layers 0 to "
                    f"{layers - 1}; use the bundle that was made for this model, with such taps"
                )
        places = {tap: tap.layer + (tap.site == "resid_post") for tap in taps}
        wanted = sorted(set(places.values()))
        self._taps = {tap: wanted.index(place) for tap, place in places.items()}
        self._read = read
        model.set_aux_hidden_state_layers(tuple(wanted))
        runner.use_aux_hidden_state_outputs = True

    def batch(self, scheduler_output: Any) -> Batch:
        """Read the taps of the step that waits to be sampled, and its rows."""
        state = self._runner.execute_model_state
        held, hidden = state.input_batch, state.aux_hidden_states
        returned = 0 if hidden is None else len(hidden)
        if returned != len(set(self._taps.values())):
            raise UnsupportedEngineError(
                f"the model returned {returned} auxiliary hidden states for the taps "
                f"{', '.join(map(str, self._taps))}: something changed its layers; leave it out"
            )
        requests = len(held.req_ids)
        rows = np.asarray(held.num_scheduled_tokens[:requests], dtype=np.int32)
        total = int(rows.sum())
        for tap, place in self._taps.items():
            self._read(tap, hidden[place][:total])  # without the padding of the graph
        first = np.asarray(held.num_computed_tokens_np[:requests], dtype=np.int32)
        return Batch(list(held.req_ids), rows, first, held.input_ids[:total])

    def processors(self) -> list[Any]:
        """Those of the sampler, in order."""
        return list(self._runner.sampler.logits_processors)
