"""What every process of this suite runs under; imported before anything that reads it.

Nothing of the user's settings and caches, no network, and no time limit that a loaded machine could
meet.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import tempfile

LIMIT = 3600
"""Seconds after which something is taken to hang. On two cores with 20 processes that want them a
server took 330 to start."""

_home = tempfile.TemporaryDirectory(prefix="midstream-vllm-", ignore_cleanup_errors=True)

for _name in list(os.environ):
    if _name.startswith(("VLLM_", "XDG_", "HF_")):
        del os.environ[_name]

os.environ |= {
    "HOME": _home.name,  # vLLM, PyTorch, Triton and Hugging Face keep caches below it
    "TORCHINDUCTOR_CACHE_DIR": f"{_home.name}/inductor",  # else by the user's name, if there is one
    "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "no_proxy": "*",
    "NO_PROXY": "*",
    # vLLM would bind its thread to a core, where other processes may be busy.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_MQ_MAX_CHUNK_BYTES_MB": "1",  # its queue of steps takes ten times this of /dev/shm
    # A server that closes a connection as the client uses it again fails the request.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "86400",
    "VLLM_ENGINE_READY_TIMEOUT_S": "3600",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",
}


def reason_not_to_run() -> str | None:
    """Why vLLM's CPU build cannot run here, where it cannot."""
    if platform.machine() != "x86_64":
        return f"constraints-vllm.txt pins builds for x86_64, this is {platform.machine()}"
    with open("/proc/cpuinfo") as file:
        if " avx2 " not in file.read():
            return "vLLM's CPU build needs AVX2"
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return "vLLM's CPU build needs libnuma.so.1 (apt-get install libnuma1)"
    if shutil.disk_usage("/dev/shm").free < 2**28:
        return "vLLM starts with 240 MiB of /dev/shm free, and no less (docker run --shm-size=1g)"
    if shutil.which("lscpu") is None:
        return "vLLM's CPU build asks lscpu (util-linux) for the machine's cores"
    return None
