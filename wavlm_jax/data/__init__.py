"""Corpora on disk, the plan of an epoch, and the loader."""
