"""The conversation ledger: what every turn left behind, behind one interface for all stores."""
