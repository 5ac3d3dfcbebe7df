"""The pre-training loss of a real WavLM is one number, whatever the batch is spread over."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.labels import LabelStore
from pretrain.predictor import NO_LABEL
from pretrain.task import FrameLabels, NoiseClips, build, outline
from tests.support.speech import NOISY, make_corpora, tiny_config
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.training.sharding import WAVLM_AXES, MeshSettings, make_mesh, parameter_shardings
from wavlm_jax.training.step import add_up
from wavlm_jax.training.task import Topology

ONE = Topology(num_devices=1, process_index=0, process_count=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pretraining")


@pytest.fixture(scope="module")
def folders(root):
    return make_corpora(root)


@pytest.fixture(scope="module")
def config(root, folders):
    return tiny_config(root, folders, **NOISY)


@pytest.fixture(scope="module")
def task(config):
    return build(config, ONE)


@pytest.fixture(scope="module")
def params(task):
    return jax.jit(task.init)(jax.random.key(1))


@pytest.fixture(scope="module")
def batch(task):
    """A global batch of 8 rows, ragged, one of them without a counted frame."""
    _, arrays = next(task.stream("train").batches())
    real = np.asarray([1.0, 0.7, 0.9, 0.5, 1.0, 0.3, 0.8, 1.0])
    num_samples = (arrays["num_samples"][:8] * real).astype(np.int32)
    arrays = {name: array[:8] for name, array in arrays.items()} | {"num_samples": num_samples}
    arrays["weight"] = np.asarray([1, 1, 1, 0, 1, 1, 1, 1], np.float32)
    arrays["waveform"] = np.where(np.arange(arrays["waveform"].shape[1]) < num_samples[:, None], arrays["waveform"], 0)
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def loss_and_gradients(task, params, batch, microbatches):
    def gradients(part):
        def total(params):
            sums = task.loss(params, part, jax.random.key(3))
            return sums.loss, sums

        (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params)
        return sums, grads

    return add_up(gradients, batch, microbatches, task.row_group)


@pytest.mark.parametrize(("data", "fsdp", "tensor", "microbatches"), [(4, 1, 1, 1), (1, 1, 1, 4), (2, 2, 2, 1)])
def test_loss_and_gradients_do_not_depend_on_devices_or_accumulation(
    task, params, batch, data, fsdp, tensor, microbatches
):
    expected, expected_grads = jax.jit(lambda p, b: loss_and_gradients(task, p, b, 1))(params, batch)
    devices = np.asarray(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    places = parameter_shardings(jax.eval_shape(task.init, jax.random.key(0)), WAVLM_AXES, mesh)
    with jax.set_mesh(mesh):
        sharded = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.device_put(leaf, places["/".join(part.key for part in path)]), params
        )
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        given = {name: jax.device_put(array, rows) for name, array in batch.items()}
        sums, grads = jax.jit(lambda p, b: loss_and_gradients(task, p, b, microbatches))(sharded, given)
    assert float(sums.count) == float(expected.count) > 0
    np.testing.assert_allclose(sums.loss, expected.loss, rtol=1e-6)
    ours, theirs = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, expected_grads)
    )
    assert np.linalg.norm(ours - theirs) < 1e-6 * np.linalg.norm(theirs)


def test_mixing_leaves_labels_and_unmixed_rows_alone(task, params, batch):
    step_key = jax.random.key(5)
    given = {**batch, "row": np.arange(8, dtype=np.int32)}
    clean = task.loss.clean_waveform(given)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, given["row"])
    mixed, did = task.loss.mixed_waveform(given, clean, keys)
    assert did.mixed.any()
    assert not did.mixed.all()
    changed = np.asarray((mixed != clean).any(axis=1))
    assert not changed[~np.asarray(did.mixed)].any()
    without = dataclasses.replace(task.loss, mixing=dataclasses.replace(task.loss.mixing, prob=0.0))
    counts = [jax.jit(loss)(params, given, step_key).histograms["label_entropy"] for loss in (task.loss, without)]
    np.testing.assert_array_equal(*counts)


def test_masks_are_torn_in_training_alone_and_where_the_objective_says_so(task):
    objective = dataclasses.replace(task.loss.predictor.objective, mask_tearing=True)
    tearing = dataclasses.replace(task.loss, predictor=task.loss.predictor.clone(objective=objective))
    keys = jax.random.split(jax.random.key(0), 2 * task.row_group)
    samples = jnp.full(len(keys), 16_000)
    whole, torn = (loss.time_mask(samples, 49, keys, training=True) for loss in (task.loss, tearing))
    assert len({*np.asarray(whole.sum(axis=1)[: task.row_group]).tolist()}) > 1
    assert len({*np.asarray(torn.sum(axis=1)[: task.row_group]).tolist()}) == 1
    np.testing.assert_array_equal(tearing.time_mask(samples, 49, keys, training=False), whole)


def test_a_mixed_row_is_normalised_again_where_the_model_wants_normalised_waves(root, folders, batch):
    task = build(tiny_config(root, folders, do_normalize=True, feat_extract_norm="layer"), ONE)
    given = {**batch, "row": np.arange(8, dtype=np.int32)}
    clean = task.loss.clean_waveform(given)
    whole = np.asarray(batch["waveform"]) / 32768
    expected = (whole - np.asarray(batch["mean"])[:, None]) / np.sqrt(np.asarray(batch["variance"]) + 1e-5)[:, None]
    real = np.arange(whole.shape[1]) < np.asarray(batch["num_samples"])[:, None]
    np.testing.assert_allclose(clean, np.where(real, expected, 0), rtol=1e-4, atol=1e-5)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), given["row"])
    mixed, did = task.loss.mixed_waveform(given, clean, keys)
    for row in np.flatnonzero(did.mixed):
        wave = np.asarray(mixed)[row, : given["num_samples"][row]]
        np.testing.assert_allclose([wave.mean(), wave.std()], [0, 1], atol=1e-3)


def test_evaluation_depends_on_the_utterance_alone(task, params):
    """Each utterance on its own, summed, is the evaluation of the padded batches."""
    whole = [jax.jit(task.loss, static_argnums=2)(params, arrays, None) for _, arrays in task.stream("valid").batches()]
    total = sum(float(sums.loss) for sums in whole)
    count = sum(float(sums.count) for sums in whole)
    assert count > 0
    one_by_one = 0.0
    evaluate = jax.jit(task.loss, static_argnums=2)
    for _, arrays in task.stream("valid").batches():
        for row in np.flatnonzero(arrays["weight"]):
            one_by_one += float(evaluate(params, {name: array[row][None] for name, array in arrays.items()}, None).loss)
    np.testing.assert_allclose(total, one_by_one, rtol=1e-5)


@pytest.mark.usefixtures("task")
def test_every_frame_of_a_crop_has_its_own_label(config):
    """The labels of a crop are those of the whole utterance, at twice the frame rate every second one (FACTS C5)."""
    store = LabelStore.open(Path(config["labels"]["path"]), "train")
    for index in range(3):
        stored = store.labels(index)
        frames = FrameLabels(store).frame_labels(index, 7, 60)
        wanted = [stored[2 * (7 + i)] if 2 * (7 + i) < len(stored) else NO_LABEL for i in range(60)]
        np.testing.assert_array_equal(frames, wanted)


def test_noise_clips_are_dealt_to_their_share_of_rows(folders):
    corpus = Corpus.open(folders["valid"])
    clips = NoiseClips(corpus, 0.25)
    rows = [clips(0, 0, 48, bits) for bits in range(400)]
    dealt = np.asarray([int(row["num_noise_samples"]) for row in rows])
    assert 0.18 < (dealt > 0).mean() < 0.32
    assert {row["noise"].shape for row in rows} == {(15440 // 2,)}
    for row in (row for row in rows if row["num_noise_samples"]):
        assert row["noise"].any()
        np.testing.assert_array_equal(row["noise"][int(row["num_noise_samples"]) :], 0)
    powers = [np.square(corpus.wave(i) / 32768.0).mean() for i in range(len(corpus))]
    for row in rows:
        nearest = min(powers, key=lambda power, row=row: abs(power - row["noise_power"]))
        assert row["noise_power"] == (pytest.approx(nearest, rel=1e-3) if row["num_noise_samples"] else 0)
    again = clips(3, 9, 48, 17)
    np.testing.assert_array_equal(again["noise"], rows[17]["noise"])


def test_the_whole_parameter_tree_is_in_the_sharding_table(task):
    mesh = make_mesh(MeshSettings.anywhere(data=-1, fsdp=2, tensor=2))
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    places = parameter_shardings(abstract, WAVLM_AXES, mesh)
    assert len(places) == len(jax.tree.leaves(abstract))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("mixing", "porb", 0.2, r"config\.mixing\.porb: no such key; did you mean prob\?"),
        ("objective", "final_dim", 2.5, r"config\.objective\.final_dim: found 2\.5 .* expected int"),
        ("model", "padding", "exakt", r"config\.model\.padding: found 'exakt'.*did you mean 'exact'\?"),
        ("modle", None, {}, r"config\.modle: no such section; did you mean model\?"),
        ("labels", "rate_hz", 50, r"rate_hz"),
        ("labels", "num_clusters", 9, r"another request|num_clusters"),
        ("data", "train", "/nowhere", r"no corpus.*python -m wavlm_jax\.data"),
        ("batch", "buckets", [2000], r"2000 frames.*seconds_per_device is 64\.0; raise it"),
        (
            "batch",
            "buckets",
            [900],
            r"nothing to train on: the 24 utterances .* bucket of 900 frames.*change the buckets",
        ),
        ("init", "path", "/nowhere", r"no model here"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(config, section, key, value, message):
    changed = json.loads(json.dumps(config))
    if key is None:
        changed[section] = value
    else:
        changed[section][key] = value
    with pytest.raises((ValueError, OSError), match=message):
        start(changed)


def start(config):
    """All that a config can get wrong before the first step."""
    task = build(config, ONE)
    task.stream("train")
    task.initial_params(jax.eval_shape(task.init, jax.random.key(0)))


def test_a_model_of_other_frames_is_refused(config):
    changed = {**config, "model": {**config["model"], "conv_stride": (5, 2, 2, 2, 2, 2, 1)}}
    with pytest.raises(
        ValueError, match=r"conv_kernel, conv_stride: found .* labels and masks are laid on these frames"
    ):
        outline(changed, ONE)


def test_the_outline_of_a_task_knows_the_batches_that_its_data_will_give(config, task):
    """`wavlm_jax.plan` compiles what train.py compiles, without corpus and labels."""
    planned = outline(config, ONE)
    for split in ("train", "valid"):
        shapes = {spec.arrays["waveform"].shape[1]: spec for spec in planned.stream(split).specs}
        for real in task.stream(split).specs:
            likely = shapes[real.arrays["waveform"].shape[1]]
            assert {name: (a.shape[1:], a.dtype) for name, a in likely.arrays.items()} == {
                name: (a.shape[1:], a.dtype) for name, a in real.arrays.items()
            }
            if split == "train":
                assert likely == real
    assert planned.row_group == task.row_group
    tree = [jax.eval_shape(one.init, jax.random.key(0)) for one in (planned, task)]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree[0]) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree[1]
    )


def test_noise_clips_have_the_shapes_that_they_announce(folders):
    clips = NoiseClips(Corpus.open(folders["valid"]), 1.0)
    found = clips(0, 0, 96, 12345)
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == {
        name: (a.shape, a.dtype) for name, a in NoiseClips.shapes(96).items()
    }
