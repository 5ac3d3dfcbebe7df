"""WavLM (arXiv 2110.13900) in JAX: model, pre-training, fine-tuning, conversion to and from PyTorch."""

__version__ = "0.1.0"
