"""From labelled text to probes. Produces bundles; never imported at serving time."""
