"""The composite models, one file a system."""

from core.models.efficientids import EfficientIDSConfig, LlamaEfficientIDSModel
from core.models.etegrec import ETEGRecConfig, LlamaETEGRecModel

__all__ = ["ETEGRecConfig", "EfficientIDSConfig", "LlamaETEGRecModel", "LlamaEfficientIDSModel"]
