"""Composition roots: what `serve run` and `serve deploy` import, and their configurations."""
