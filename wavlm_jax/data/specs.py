"""The static shapes of batches, which follow from the config alone: a run can be compiled before there is any data."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from wavlm_jax.data.plan import BatchSettings, microbatches, rows_per_bucket, seconds_of
from wavlm_jax.data.reader import Host
from wavlm_jax.shapes import samples_for
from wavlm_jax.training.stream import BatchSpec


def batch_specs(
    rows: Mapping[int, int],
    batch: BatchSettings,
    annotations: Callable[[int], Mapping[str, Any]],
    devices: int,
    group: int,
) -> tuple[BatchSpec, ...]:
    """One spec a bucket.

    Args:
        rows: bucket in frames -> rows of a global batch.
        batch: seconds per device.
        annotations: bucket -> what a row has besides its audio: name -> an array, or its shape and dtype.
        devices: that share the rows.
        group: consecutive rows that stay on one device and in one micro-batch.

    Raises:
        PlanError: rows that the devices cannot share, or too much audio for one.

    """
    specs = []
    for bucket, count in sorted(rows.items()):
        arrays = {
            "waveform": jax.ShapeDtypeStruct((count, samples_for(bucket)), np.int16),
            **dict.fromkeys(("num_samples", "id"), jax.ShapeDtypeStruct((count,), np.int32)),
            **dict.fromkeys(("weight", "mean", "variance"), jax.ShapeDtypeStruct((count,), np.float32)),
            **{
                name: jax.ShapeDtypeStruct((count, *array.shape), array.dtype)
                for name, array in annotations(bucket).items()
            },
        }
        steps = microbatches(count, bucket, batch, devices, group)
        specs.append(BatchSpec(f"{count}x{bucket}", arrays, steps, count * seconds_of(bucket)))
    return tuple(specs)


@dataclass(frozen=True)
class SpecStream:
    """A `training.task.BatchStream` of which only the shapes are there."""

    specs: tuple[BatchSpec, ...]
    num_batches: int | None = None

    def batches(self, start: int = 0) -> Iterator[tuple[BatchSpec, dict[str, np.ndarray]]]:
        """There are none."""
        raise NotImplementedError(f"batch {start}: this task was made for planning and has no data")

    def name(self, index: int) -> str:
        """There are none here either."""
        raise NotImplementedError(f"utterance {index}: this task was made for planning and has no data")


def spec_stream(
    batch: BatchSettings,
    annotations: Callable[[int], Mapping[str, Any]],
    devices: int,
    group: int,
    host: Host,
) -> SpecStream:
    """The stream of a run that has no data yet: every bucket counts as used, and every batch as full.

    Args:
        batch: buckets and seconds.
        annotations: as for `batch_specs`.
        devices: that share the rows.
        group: as for `batch_specs`.
        host: one of those that are to make the rows.

    Raises:
        ValueError: rows that hosts or devices cannot share, or too much audio for one device.

    """
    rows = rows_per_bucket(batch)
    for count in rows.values():
        host.rows(count)
    return SpecStream(batch_specs(rows, batch, annotations, devices, group))
