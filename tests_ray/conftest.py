"""Settings of Ray, which reads them when it is imported and in every process that it starts."""

import os
import secrets
import sys
from pathlib import Path

HERE = Path(__file__).parent
PATIENCE = "300"  # seconds, against hanging; Ray's own limits are often 5 to 60

sys.path += [str(HERE), str(HERE.parent / "docs")]
os.environ |= {
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "docs")]),  # of the replicas
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray writes one into the home
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # else replicas are killed when others fill the memory
    "RAY_worker_niceness": "0",  # else 15: on a loaded machine replicas get next to nothing
    "RAY_gcs_server_port_wait_time_s": PATIENCE,
    "RAY_gcs_server_request_timeout_seconds": PATIENCE,
    "RAY_worker_register_timeout_seconds": PATIENCE,
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": PATIENCE,
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": PATIENCE,
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": PATIENCE,
}
