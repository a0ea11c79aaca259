"""Measure the models: ``python -m bench SUITE``."""
