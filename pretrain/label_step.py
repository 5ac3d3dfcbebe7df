"""The device's part of making labels, traced from the config alone: what `wavlm_jax.plan` compiles."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Traced

from pretrain.assigning import label_program
from pretrain.features import MFCC_BLOCK, mfcc_frames
from pretrain.layer_features import Padded, layer_output, rows_for, samples_of
from pretrain.mfcc import MFCC_DIM
from pretrain.row_shards import ROWS, row_mesh, rows_over
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.settings import read
from wavlm_jax.shapes import SAMPLE_RATE, Geometry, samples_for


def trace_label_step(
    devices: Sequence[jax.Device],
    *,
    num_clusters: int,
    rate_hz: int,
    run: str | None,
    layer: int | None,
    piece_seconds: float,
    batch_seconds: float,
) -> tuple[str, Traced, float, Mesh]:
    """(name, program, seconds of audio, mesh) of the step that labels a batch.

    Args:
        devices: of all hosts, as many on each. The others are as in `LabelSettings`.
        num_clusters: centroids.
        rate_hz: of MFCC labels.
        run: the teacher's folder, which gives its shape; where nothing is there yet, it is taken for a HuBERT Base,
            whose layer 9 the paper clusters. None: MFCC.
        layer: of the teacher; None: MFCC.
        piece_seconds: the longest row.
        batch_seconds: of the rows of a host.

    """
    mesh = row_mesh(devices)
    hosts = len({device.process_index for device in devices})
    rows_of = NamedSharding(mesh, ROWS)
    if run is None or layer is None:
        block = MFCC_BLOCK * hosts
        frames, centroids = _shape((block, MFCC_DIM), mesh, ROWS), _shape((num_clusters, MFCC_DIM), mesh)
        traced = label_program(mfcc_frames, rows_of).trace((), frames, centroids)
        return f"labels mfcc {block}", traced, block / rate_hz, mesh
    teacher = dataclasses.replace(teacher_config(Path(run)), num_hidden_layers=layer, padding="exact")
    geometry = Geometry(teacher.conv_kernel, teacher.conv_stride)
    a_second = SAMPLE_RATE / geometry.hop
    bucket = int(piece_seconds * a_second)
    rows = rows_for(bucket, int(batch_seconds * a_second), len(devices) // hosts) * hosts
    fields: list[Any] = [
        _shape((rows, samples_of(bucket, geometry)), mesh, ROWS, np.int16),
        *(_shape((rows,), mesh, ROWS, dtype) for dtype in (np.int32, np.float32, np.float32)),
    ]
    batch: Any = Padded(*fields)
    params = jax.tree.map(lambda leaf: _shape(leaf.shape, mesh, dtype=leaf.dtype), _abstract(teacher))
    centroids = _shape((num_clusters, teacher.hidden_size), mesh)
    with rows_over(mesh):
        traced = label_program(partial(layer_output, teacher), rows_of).trace(params, batch, centroids)
    return f"labels {rows}x{bucket}", traced, rows * piece_seconds, mesh


def teacher_config(path: Path) -> WavLMConfig:
    """Of a run's workdir or a Hugging Face folder; HuBERT Base where neither is there."""
    file = path / "config.json"
    if not file.is_file():
        return WavLMConfig.base(position_bias=False)
    found = json.loads(file.read_text())
    if "model" in found:
        model: WavLMConfig = read(found["model"], WavLMConfig, "model")
        return model
    return WavLMConfig.from_huggingface(found)


def _abstract(teacher: WavLMConfig) -> Any:
    samples = samples_for(1, Geometry(teacher.conv_kernel, teacher.conv_stride))

    def init() -> Any:
        return WavLM(teacher).init(jax.random.key(0), jnp.zeros((1, samples)), jnp.full((1,), samples, jnp.int32))

    return jax.eval_shape(init)["params"]


def _shape(
    shape: Sequence[int], mesh: Mesh, spec: PartitionSpec | None = None, dtype: Any = np.float32
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))
