"""From items to semantic IDs on disk: item vectors, tokenizers, and the two commands that make them."""
