"""The pre-training program: labels, mixing, objective."""
