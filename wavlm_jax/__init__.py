"""WavLM (arXiv 2110.13900) in JAX: model, pre-training, fine-tuning, conversion to and from PyTorch."""

from typing import TYPE_CHECKING, Any

from wavlm_jax.version import __version__

if TYPE_CHECKING:
    from wavlm_jax.export import save_huggingface, save_microsoft
    from wavlm_jax.inference.api import align, classify, diarize, embed, transcribe, verify
    from wavlm_jax.loading import load
    from wavlm_jax.weights import Model

__all__ = [
    "Model",
    "__version__",
    "align",
    "classify",
    "diarize",
    "embed",
    "load",
    "save_huggingface",
    "save_microsoft",
    "transcribe",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are asked for: `import wavlm_jax` alone costs nothing."""
    if name in ("save_huggingface", "save_microsoft"):
        from wavlm_jax import export  # noqa: PLC0415

        return getattr(export, name)
    if name in ("load", "Model"):
        from wavlm_jax import loading  # noqa: PLC0415

        return getattr(loading, name)
    if name in __all__:
        from wavlm_jax.inference import api  # noqa: PLC0415

        return getattr(api, name)
    raise AttributeError(f"module 'wavlm_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
