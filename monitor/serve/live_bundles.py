"""What the page needs of the bundles that its streams are judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from midstream.bundle import Bundle


class KnownBundles:
    """Levels, horizons and hazards, by a bundle's hash; None where the bundle is not known.

    Parameters
    ----------
    bundle_of : callable
        From a bundle's hash to the bundle, or None.
    """

    def __init__(self, bundle_of: Callable[[str], Bundle | None]) -> None:
        self._bundle_of = bundle_of
        self._facts: dict[str, dict[str, Any] | None] = {}

    def learn(self, digest: str) -> None:
        """Ask for it now: after a reload it may not be known any more."""
        if digest not in self._facts:
            self._facts[digest] = _facts(self._bundle_of(digest))

    def hold_back(self, digest: str) -> int:
        """Tokens a client stays behind; 1 for whole turns, whose pieces have no position."""
        depth = (self._facts[digest] or {}).get("hold_back", 1)
        return depth if isinstance(depth, int) else 1

    def keep(self, used: set[str]) -> dict[str, dict[str, Any] | None]:
        """Return these, and forget all others."""
        self._facts = {digest: self._facts[digest] for digest in used}
        return self._facts


def _facts(bundle: Bundle | None) -> dict[str, Any] | None:
    if bundle is None:
        return None
    policy = bundle.policy
    return {
        "tiers": {name: tier.model_dump(mode="json") for name, tier in policy.tiers.items()},
        "hold_back": policy.hold_back,
        "on_unscored": policy.on_unscored,
        "segments": list(policy.segments),
        "probes": [
            {"name": probe.name, "hazard": probe.hazard, "reads": probe.reads}
            for probe in bundle.bank.heads
        ],
    }
