"""Interaction logs → a prepared data set on disk → batches. Knows nothing of models."""
