"""Readers of interaction logs as people have them, all behind `Source`."""

from efficientids.data.sources.opening import KINDS, open_source
from efficientids.data.sources.options import SourceOptions

__all__ = ["KINDS", "SourceOptions", "open_source"]
