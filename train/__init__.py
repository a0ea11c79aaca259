"""Train the models: ``python -m train RECIPE``."""
