"""Recommendations in bulk."""
