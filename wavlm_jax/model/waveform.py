"""From the int16 rows of a batch to what a model hears."""

import jax.numpy as jnp

from wavlm_jax.config import WavLMConfig
from wavlm_jax.shapes import Batch, Waveform

INT16_SCALE = 32_768.0
"""int16 on the wire is divided by this: [-1, 1)."""


def model_waveform(batch: Batch, config: WavLMConfig) -> Waveform:
    """float32 rows; where the model wants it, normalised by the statistics of the *whole* utterance (FACTS C4).

    Args:
        batch: `waveform` int16 (rows, samples), `num_samples`; `mean` and `variance` of each whole utterance.
        config: `do_normalize`, `normalize_eps`.

    """
    waveform: Waveform = batch["waveform"].astype(jnp.float32) / INT16_SCALE
    if not config.do_normalize:
        return waveform
    deviation = jnp.sqrt(batch["variance"] + config.normalize_eps)
    normalised = (waveform - batch["mean"][:, None]) / deviation[:, None]
    real = jnp.arange(waveform.shape[1])[None, :] < batch["num_samples"][:, None]
    return jnp.where(real, normalised, 0.0)
