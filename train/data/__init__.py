"""Pictures and what was precomputed of them, in an order that depends on the seed alone."""
