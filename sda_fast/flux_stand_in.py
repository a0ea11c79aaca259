"""What makes diffusers take a module for the FLUX transformer that it wraps."""

from typing import Any

from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import nn


class StandIn(nn.Module):
    """Answers everything but ``forward`` as the transformer does, by its names.

    Args:
        transformer: that it stands in for.

    Attributes:
        transformer: likewise.
    """

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.train(transformer.training)
        self.__module__ = FluxTransformer2DModel.__module__  # what a pipeline's index tells

    @property
    def __class__(self) -> type:  # pyrefly: ignore[bad-override]
        """diffusers looks for adapters and for what to save on models of its own classes only."""
        return FluxTransformer2DModel

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "transformer":  # not there yet
                raise
            return getattr(super().__getattr__("transformer"), name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the transformer, by its names; so are the parameters."""
        return self.transformer.named_modules(*args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """That of the transformer."""
        return self.transformer.get_submodule(target)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the transformer."""
        return self.transformer.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the transformer."""
        return self.transformer.load_state_dict(*args, **kwargs)
