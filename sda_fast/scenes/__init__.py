"""A world small enough to train: seeded scenes, their captions, a parser, and the models' sizes.

The models are the ones of the real system (``FluxTransformer2DModel``, ``SemanticAdapter``, the
pipelines), only smaller, so that every claim can be checked exactly and on a CPU.
"""
