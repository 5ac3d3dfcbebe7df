"""The device's part of making labels, traced from the config alone: what `wavlm_jax.plan` compiles."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Traced

from pretrain.kmeans import nearest
from pretrain.layer_features import Padded, layer_output, rows_for, rows_over, samples_of
from pretrain.mfcc import MFCC_DIM
from wavlm_jax.config import WavLMConfig
from wavlm_jax.model.wavlm import WavLM
from wavlm_jax.settings import read
from wavlm_jax.shapes import SAMPLE_RATE, Geometry, samples_for

MFCC_BLOCK = 2**14
"""Frames, as `features.MfccFeatures` packs them."""
ROWS = PartitionSpec("rows")


def trace_label_step(
    devices: Sequence[jax.Device],
    *,
    num_clusters: int,
    rate_hz: int,
    run: str | None,
    layer: int | None,
    piece_seconds: float,
    batch_seconds: float,
) -> tuple[str, Traced, float]:
    """(name, program, seconds of audio) of the step that labels a batch; the arguments are those of `LabelSettings`.

    Args:
        devices: of one host: each host labels its own share.
        num_clusters: centroids.
        rate_hz: of MFCC labels.
        run: the teacher's folder, which gives its shape; where nothing is there yet, it is taken for a HuBERT Base,
            whose layer 9 the paper clusters. None: MFCC.
        layer: of the teacher; None: MFCC.
        piece_seconds: the longest row.
        batch_seconds: of all rows.

    """
    mesh = Mesh(np.array(devices), ("rows",), axis_types=(AxisType.Auto,))
    if run is None or layer is None:
        frames = _shape((MFCC_BLOCK, MFCC_DIM), np.float32, mesh, ROWS)
        traced = jax.jit(nearest).trace(frames, _shape((num_clusters, MFCC_DIM), np.float32, mesh))
        return f"labels mfcc {MFCC_BLOCK}", traced, MFCC_BLOCK / rate_hz
    teacher = dataclasses.replace(teacher_config(Path(run)), num_hidden_layers=layer, padding="exact")
    geometry = Geometry(teacher.conv_kernel, teacher.conv_stride)
    a_second = SAMPLE_RATE / geometry.hop
    bucket = int(piece_seconds * a_second)
    rows = rows_for(bucket, int(batch_seconds * a_second), len(devices))
    fields: list[Any] = [
        _shape((rows, samples_of(bucket, geometry)), np.int16, mesh, ROWS),
        *(_shape((rows,), dtype, mesh, ROWS) for dtype in (np.int32, np.float32, np.float32)),
    ]
    batch: Any = Padded(*fields)

    def label(params: Any, batch: Any, centroids: Any) -> Any:
        return nearest(layer_output(teacher, params, batch), centroids)[0]

    params = jax.tree.map(lambda leaf: _shape(leaf.shape, leaf.dtype, mesh), _abstract(teacher))
    centroids = _shape((num_clusters, teacher.hidden_size), np.float32, mesh)
    with rows_over(mesh):
        traced = jax.jit(label).trace(params, batch, centroids)
    return f"labels {rows}x{bucket}", traced, rows * piece_seconds


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


def _shape(shape: Sequence[int], dtype: Any, mesh: Mesh, spec: PartitionSpec | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))
