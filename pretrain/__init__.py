"""The pre-training programme: labels, mixing, objective."""
