"""Fast attention and modules for semantic diffusion adapters on FLUX.1.

Names load what they need when they are first used: importing this package imports torch only.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sda_fast import ops, reference
    from sda_fast.adapter import SemanticAdapter
    from sda_fast.attachment import attach
    from sda_fast.editors.llm import LLMEditor
    from sda_fast.editors.result import EditResult
    from sda_fast.editors.script import ScriptEditor
    from sda_fast.editors.t5 import EmbeddingEditor
    from sda_fast.editors.text import InstructionEncoder
    from sda_fast.embedding import SemanticEmbedding
    from sda_fast.encoders import ImageEncoder
    from sda_fast.fast_flux import FastFlux
    from sda_fast.hierarchy import Hierarchy
    from sda_fast.pipeline import SemanticPipeline

__version__ = "0.1.0"

_HOMES = {
    "EditResult": "sda_fast.editors.result",
    "EmbeddingEditor": "sda_fast.editors.t5",
    "FastFlux": "sda_fast.fast_flux",
    "Hierarchy": "sda_fast.hierarchy",
    "ImageEncoder": "sda_fast.encoders",
    "InstructionEncoder": "sda_fast.editors.text",
    "LLMEditor": "sda_fast.editors.llm",
    "ScriptEditor": "sda_fast.editors.script",
    "SemanticAdapter": "sda_fast.adapter",
    "SemanticEmbedding": "sda_fast.embedding",
    "SemanticPipeline": "sda_fast.pipeline",
    "attach": "sda_fast.attachment",
}

__all__ = [
    "EditResult",
    "EmbeddingEditor",
    "FastFlux",
    "Hierarchy",
    "ImageEncoder",
    "InstructionEncoder",
    "LLMEditor",
    "ScriptEditor",
    "SemanticAdapter",
    "SemanticEmbedding",
    "SemanticPipeline",
    "attach",
    "ops",
    "reference",
]


def __getattr__(name: str) -> object:
    if name in ("ops", "reference"):
        return import_module(f"sda_fast.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'sda_fast' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
