"""The training tower: one loop for every task."""
