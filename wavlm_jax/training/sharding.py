"""Where every array is: the mesh, and the tables from parameter names to logical axes, and from those to mesh axes.

The mesh axes are `data`, `fsdp` and `tensor`, all of type Auto: the tables say what is wanted, and XLA inserts the
communication. Nothing here changes a result.

Parameter names are Hugging Face's, with "/" for "."; Transformer layers are stacked on axis 0. What is small (conv
encoder, norms, biases, gate, masks) is whole on every device; what is large is split (`RULES`).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wavlm_jax.shapes import Params

KeyPath = tuple[Any, ...]


def path_name(path: KeyPath) -> str:
    """A tree path as "encoder/layers/attention/q_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


AxesTable = tuple[tuple[str, tuple[str | None, ...]], ...]
"""Rows of (regular expression over the whole parameter path, one logical axis per dimension; None = never split)."""

ENCODER_AXES: AxesTable = (
    (r"(.*/)?masked_spec_embed", (None,)),
    (r"(.*/)?feature_extractor/conv_layers[_/]\d+/conv/kernel", (None, None, None)),
    (r"(.*/)?feature_extractor/conv_layers[_/]\d+/(conv/bias|layer_norm/(scale|bias))", (None,)),
    (r"(.*/)?feature_projection/layer_norm/(scale|bias)", (None,)),
    (r"(.*/)?feature_projection/projection/kernel", (None, "embed")),
    (r"(.*/)?feature_projection/projection/bias", (None,)),
    (r"(.*/)?encoder/pos_conv_embed/conv/weight_[vg]", (None, None, None)),
    (r"(.*/)?encoder/pos_conv_embed/(conv/bias|batch_norm/(scale|bias))", (None,)),
    (r"(.*/)?encoder/layer_norm/(scale|bias)", (None,)),
    (r"(.*/)?encoder/rel_attn_embed/embedding", (None, "heads")),
    (r"(.*/)?encoder/layers/attention/[qkv]_proj/kernel", ("layers", "embed", "heads")),
    (r"(.*/)?encoder/layers/attention/[qkv]_proj/bias", ("layers", "heads")),
    (r"(.*/)?encoder/layers/attention/out_proj/kernel", ("layers", "heads", "embed")),
    (r"(.*/)?encoder/layers/attention/out_proj/bias", ("layers", None)),
    (r"(.*/)?encoder/layers/attention/gru_rel_pos_linear/kernel", ("layers", None, None)),
    (r"(.*/)?encoder/layers/attention/gru_rel_pos_linear/bias", ("layers", None)),
    (r"(.*/)?encoder/layers/attention/gru_rel_pos_const", ("layers", "heads")),
    (r"(.*/)?encoder/layers/(final_)?layer_norm/(scale|bias)", ("layers", None)),
    (r"(.*/)?encoder/layers/feed_forward/intermediate_dense/kernel", ("layers", "embed", "mlp")),
    (r"(.*/)?encoder/layers/feed_forward/intermediate_dense/bias", ("layers", "mlp")),
    (r"(.*/)?encoder/layers/feed_forward/output_dense/kernel", ("layers", "mlp", "embed")),
    (r"(.*/)?encoder/layers/feed_forward/output_dense/bias", ("layers", None)),
)
"""A WavLM or HuBERT encoder, under any prefix."""

ADAPTER_AXES: AxesTable = (
    (r"lora/wavlm/feature_projection/projection/kernel/a", (None, None)),
    (r"lora/wavlm/feature_projection/projection/kernel/b", (None, "embed")),
    (r"lora/wavlm/encoder/layers/attention/gru_rel_pos_linear/kernel/[ab]", ("layers", None, None)),
    (r"lora/.*/(attention/[qkv]_proj|feed_forward/intermediate_dense)/kernel/a", ("layers", "embed", None)),
    (r"lora/.*/attention/[qkv]_proj/kernel/b", ("layers", None, "heads")),
    (r"lora/.*/feed_forward/intermediate_dense/kernel/b", ("layers", None, "mlp")),
    (r"lora/.*/attention/out_proj/kernel/a", ("layers", "heads", None)),
    (r"lora/.*/feed_forward/output_dense/kernel/a", ("layers", "mlp", None)),
    (r"lora/.*/(attention/out_proj|feed_forward/output_dense)/kernel/b", ("layers", None, "embed")),
)
"""Low-rank adapters (`wavlm_jax.lora`): inputs and outputs are split as those of their kernel, the rank never is."""

WAVLM_AXES: AxesTable = (
    *ENCODER_AXES,
    *ADAPTER_AXES,
    (r"(.*/)?final_proj/kernel", ("embed", None)),
    (r"(.*/)?final_proj/bias", (None,)),
    (r"(.*/)?label_embeddings", (None, "embed")),
    (r"layer_weights", (None,)),
    (r"adapter/proj/kernel", ("embed", None)),
    (r"adapter/proj_layer_norm/scale", (None,)),
    (r"adapter/layers_\d+/conv/kernel", (None, "embed", None)),
    (r"adapter/(proj|proj_layer_norm|layers_\d+/conv)/bias", (None,)),
    (r"(lm_head|projector|classifier|feature_extractor|tdnn_\d+/kernel)/kernel", ("embed", None)),
    (r"(lm_head|projector|classifier|feature_extractor|tdnn_\d+/kernel)/bias", (None,)),
    (r"objective/weight", ("embed", None)),
    (r"ecapa/(.*/)?(conv|attend[12])/kernel", (None, "embed", None)),
    (r"ecapa/(.*/)?(linear|up|down)/kernel", ("embed", None)),
    (r"ecapa/(.*/)?(conv|attend[12]|linear|up|down)/bias", (None,)),
    (r"ecapa/(.*/)?bn/(scale|bias|mean|variance)", (None,)),
)
"""An encoder alone, with the masked-prediction head, or with any head of `wavlm_jax.model.heads`."""


MESH_AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""Mesh axes over which the rows of a batch are spread."""


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Sizes of the mesh. At most one is -1, which stands for all remaining devices."""

    data: int
    """Copies of the parameters; each works on other rows."""
    fsdp: int
    """Devices over which parameters and optimizer state are split; each works on other rows. Best 8 or 16."""
    tensor: int
    """Devices that share the same rows and split heads and feed-forward units."""
    platform: str | None
    """cpu, gpu or tpu. A run that finds another is refused (`hosts.check_machine`), also by the next two; None: any."""
    hosts: int | None
    """Number of processes; None: any."""
    devices: int | None
    """Number of devices of all processes; None: any."""

    @classmethod
    def anywhere(cls, *, data: int, fsdp: int, tensor: int) -> "MeshSettings":
        """Settings for any machine."""
        return cls(data=data, fsdp=fsdp, tensor=tensor, platform=None, hosts=None, devices=None)

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) with -1 resolved.

        Raises:
            ValueError: where they do not multiply to `num_devices`.

        """
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) == 1 and known > 0 and num_devices % known == 0:
            sizes[sizes.index(-1)] = num_devices // known
        if min(sizes) < 1 or math.prod(sizes) != num_devices:
            raise ValueError(
                f"config.mesh: data {self.data}, fsdp {self.fsdp}, tensor {self.tensor} on {num_devices} devices; "
                f"expected sizes that multiply to {num_devices}, one of them may be -1 (the rest)"
            )
        return sizes[0], sizes[1], sizes[2]


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor), rows in the order of the processes.

    `jax.make_mesh` knows the physical network but may interleave processes (and refuses several slices); a loader hands
    out rows by process, so then the plain order is taken: slice by slice, so that only `data` crosses the data centre's
    network.

    Args:
        settings: the sizes.
        devices: of this machine (None), or of one that is planned for.

    Raises:
        ValueError: sizes that do not fit the devices, the hosts or the slices.

    """
    found = sorted(jax.devices() if devices is None else devices, key=lambda d: (slice_of(d), d.process_index, d.id))
    sizes = settings.sizes(len(found))
    _check_network(sizes, found)
    plain = Mesh(np.array(found).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    if slice_of(found[-1]) != slice_of(found[0]):
        return plain
    try:
        mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=found)
    except NotImplementedError:  # fsdp 8 on 4 x 4 x 4 chips: no product of whole physical axes
        return plain
    owners = [device.process_index for device in mesh.devices.flat]
    return mesh if owners == sorted(owners) else plain


def slice_of(device: jax.Device) -> int:
    """Number of the TPU slice of a device; 0 for other devices."""
    return int(getattr(device, "slice_index", 0) or 0)


def _check_network(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> None:
    """Checks that `tensor` stays within a host, and `fsdp` and `tensor` within a slice."""
    a_host = min(Counter(device.process_index for device in devices).values())
    if a_host % sizes[2]:
        raise ValueError(f"config.mesh.tensor: {sizes[2]} does not divide the {a_host} devices per host")
    a_slice = min(Counter(slice_of(device) for device in devices).values())
    if a_slice % (sizes[1] * sizes[2]):
        raise ValueError(
            f"config.mesh: fsdp {sizes[1]} x tensor {sizes[2]} does not divide the {a_slice} devices per slice; only "
            "data may cross the network between slices"
        )


def row_shards(mesh: Mesh) -> int:
    """Number of devices that work on different rows: data * fsdp."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("rows", ROWS),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
    ("frames", None),
    ("samples", None),
    ("channels", None),
    ("width", None),
)
"""Logical axis -> mesh axes, for parameters and for activations (the model's `nn.with_logical_constraint`)."""
SMALLEST_SHARD = 16
"""Rows of a parameter on a device; fewer are less than a tile of a TPU."""


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """First axis split over `ROWS`."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def parameter_axes(params: Params, table: AxesTable) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of every parameter.

    Args:
        params: arrays or ShapeDtypeStructs.
        table: every parameter must match exactly one row, of its own rank.

    Raises:
        ValueError: naming the parameter that matches no row, several, or one of another rank.

    """
    result = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        rows = [(pattern, axes) for pattern, axes in table if re.fullmatch(pattern, name)]
        if len(rows) != 1:
            found = "no row" if not rows else f"{len(rows)} rows ({', '.join(pattern for pattern, _ in rows)})"
            raise ValueError(f"sharding table: parameter {name} {leaf.shape} matches {found}, expected exactly one")
        (pattern, axes) = rows[0]
        if len(axes) != len(leaf.shape):
            raise ValueError(
                f"sharding table: parameter {name} has shape {leaf.shape}, but row {pattern!r} names {len(axes)} axes"
            )
        result[name] = axes
    return result


def parameter_shardings(params: Params, table: AxesTable, mesh: Mesh) -> dict[str, NamedSharding]:
    """Path -> sharding. An axis that its mesh axis does not divide stays whole (`describe` shows it)."""
    rules = dict(RULES)
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    result = {}
    for name, axes in parameter_axes(params, table).items():
        unknown = [axis for axis in axes if axis is not None and axis not in rules]
        if unknown:
            raise ValueError(f"sharding table: {name} names axis {unknown[0]!r}; known: {', '.join(rules)}")
        wanted = [None if axis is None else rules[axis] for axis in axes]
        fits = [
            axis if isinstance(axis, str) and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(wanted, shapes[name], strict=True)
        ]
        result[name] = NamedSharding(mesh, PartitionSpec(*fits))
    return result


def thin_shards(params: Params, shardings: Mapping[str, NamedSharding]) -> str | None:
    """Advice where `fsdp` leaves less than `SMALLEST_SHARD` rows of a parameter on a device; None: no need."""
    thin = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        spec = shardings[name].spec
        for axis, size in zip(spec, leaf.shape, strict=False):
            shards = shardings[name].mesh.shape["fsdp"] if axis == "fsdp" else 1
            if shards > 1 and size // shards < SMALLEST_SHARD:
                thin[name] = size // shards
    if not thin:
        return None
    first = min(thin, key=lambda name: thin[name])
    return (
        f"config.mesh.fsdp: leaves {thin[first]} rows of {first} on a device ({len(thin)} parameters have less than "
        f"{SMALLEST_SHARD}); XLA then gathers weights by all-reduce, at twice the bytes. Take a smaller fsdp, more data"
    )


def state_shardings(state: Any, params: Params, shardings: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings of a train state.

    Args:
        state: what has the path and shape of a parameter (Adam's moments) is placed like it. Scalars, and what an
            optimizer keeps of a parameter in another shape (factored moments), are on every device.
        params: their shapes.
        shardings: path of a parameter -> its sharding.
        mesh: for the rest.

    Raises:
        ValueError: naming an array that is none of these.

    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def of(path: KeyPath, leaf: Any) -> NamedSharding:
        followed = next((name for start in range(len(path)) if (name := path_name(path[start:])) in shapes), None)
        if followed is None and leaf.shape:
            raise ValueError(f"sharding: {path_name(path)} {leaf.shape} follows no parameter and is no scalar")
        return shardings[followed] if followed and shapes[followed] == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(of, state)


def place(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, name: str
) -> dict[str, jax.Array]:
    """Moves this host's rows of a batch onto its devices; the result is the global batch.

    Args:
        arrays: this host's rows.
        shapes: global shapes, for which the step was compiled.
        mesh: over which the rows are split.
        name: of the batch, for messages.

    Raises:
        ValueError: names, dtypes or shapes are not those that the step was compiled for.

    """
    if set(arrays) != set(shapes):
        raise ValueError(f"batch {name}: found arrays {sorted(arrays)}, expected {sorted(shapes)}")
    placed = {}
    for key, expected in shapes.items():
        local = (expected.shape[0] // jax.process_count(), *expected.shape[1:])
        found = arrays[key]
        if found.shape != local or found.dtype != expected.dtype:
            raise ValueError(f"batch {name}: {key} is {found.dtype}{found.shape}, expected {expected.dtype}{local}")
        placed[key] = jax.make_array_from_process_local_data(by_rows(mesh), found, expected.shape)
    return placed


def describe(params: Params, shardings: Mapping[str, NamedSharding]) -> str:
    """A table for people: one line per parameter with shape, dtype and split, then the totals."""
    lines, total, held = [], 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        local = math.prod(shardings[name].shard_shape(leaf.shape))
        total, held = total + math.prod(leaf.shape), held + local
        split = [axis for axis in shardings[name].spec if axis and shardings[name].mesh.shape[axis] > 1]
        place = f"split over {', '.join(split)}" if split else "whole"
        lines.append(f"  {name:<72} {leaf.shape!s:<22} {leaf.dtype!s:<9} {place}")
    lines.append(f"  {total:,} parameters, {held:,} on each device")
    return "\n".join(lines)
