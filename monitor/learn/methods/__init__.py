"""Ways to train a read-out, one module each behind the interface in `.method`."""
