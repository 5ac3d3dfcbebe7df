"""Trained models on recordings: batches by length, long files in pieces, results as files of the field."""
