"""vLLM: watch every request of a server, halt rows in the same step (docs/vllm.md).

Four seams, each named on vLLM's command line or found by its plugin loader:

- `worker` (``--worker-cls``) loads the bundle, taps the layers and judges the rows of each step;
- `halting` (``--logits-processors``) forces the end of sequence on halted rows, on the device;
- `scheduler` (``--scheduler-cls``) lets a token go only when its own residual was judged;
- `frontend` (entry point ``vllm.general_plugins``) gives clients the policy's finish reason.

Nothing is imported here: vLLM's processes load these modules one by one.
"""
