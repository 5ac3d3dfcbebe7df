"""Pre-training configs cut to one batch of full rows, which the benchmarks of accelerators have in common."""

import importlib
from typing import Any

FRAMES = 768


def row_config(name: str, rows: int, microbatches: int) -> Any:
    """configs/pretrain/`name`.py with one bucket, of 768 frames, and `rows` rows an update in so many micro-batches."""
    from wavlm_jax.data.batches import seconds_of

    config = importlib.import_module(f"configs.pretrain.{name}").get_config()
    seconds = rows * seconds_of(FRAMES)
    config.batch.buckets = (FRAMES,)
    config.batch.update({"seconds_per_update": seconds, "row_multiple": rows})
    config.batch.seconds_per_device = seconds / microbatches
    return config
