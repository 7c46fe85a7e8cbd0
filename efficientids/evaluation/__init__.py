"""Ranking metrics, full-catalogue evaluation."""
