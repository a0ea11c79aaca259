"""Editors: an embedding and an instruction in, another embedding out; pixels are never touched.

``result`` says what every editor takes and gives; ``t5``, ``llm`` and ``script`` are three of them.
"""
