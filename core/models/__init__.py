"""The composite models, one file a system."""

from core.models.efficientids import EfficientIDSConfig, LlamaEfficientIDSModel

__all__ = ["EfficientIDSConfig", "LlamaEfficientIDSModel"]
