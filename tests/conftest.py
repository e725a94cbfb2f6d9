"""Settings for the whole suite."""

import os

from hypothesis import HealthCheck, settings

# Nothing in the tests may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# Machines under load are slow at times, and some draws are unlucky: neither is a property of the
# code.
settings.register_profile(
    "midstream",
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
    ],
    print_blob=True,
)
settings.load_profile("midstream")
