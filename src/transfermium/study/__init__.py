"""Comparisons that tell what pre-training saved."""
