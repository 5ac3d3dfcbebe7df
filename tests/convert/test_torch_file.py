"""The reader gives what torch.load gives, and survives whatever else a file may hold."""

import argparse
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.support import hostile
from wavlm_jax.convert import pickle_machine
from wavlm_jax.convert.pickle_machine import Inert
from wavlm_jax.convert.torch_file import LazyTensor, read_torch_file
from wavlm_jax.files import DamagedFile, HostileFile

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
ROOT = Path(__file__).parents[2]
FAULTS = (HostileFile, DamagedFile)


def save(value, path: Path, *, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        values = found.read()
        assert found.shape == tuple(expected.shape) == values.shape
        assert values.dtype == found.dtype
        assert values.flags.c_contiguous
        assert values.flags.writeable
        np.testing.assert_array_equal(values, as_numpy(expected), strict=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(found) is (tuple if isinstance(expected, torch.Size) else type(expected))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def assert_read_as_torch_does(path: Path) -> None:
    assert_same(read_torch_file(path), torch.load(path, weights_only=False))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(tmp_path, zipped, dtype):
    values = torch.arange(-3, 9).reshape(3, 4).to(getattr(torch, dtype))
    assert_read_as_torch_does(save({"x": values}, tmp_path / "x.pt", zipped=zipped))


@LAYOUTS
def test_views_of_one_storage(tmp_path, zipped):
    base = torch.arange(120.0).reshape(4, 5, 6)
    views = {
        "base": base,
        "row": base[2],
        "transposed": base.permute(2, 0, 1),
        "stepped": base[1::2, :, ::3],
        "diagonal": base[:, :, 0].diagonal(),
        "one": base[3, 4, 5],
        "none": base[:0],
    }
    assert_read_as_torch_does(save(views, tmp_path / "views.pt", zipped=zipped))


@LAYOUTS
def test_a_module_with_buffers_and_parameters(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.BatchNorm1d(4), torch.nn.Linear(3, 2)).half()
    state = module.state_dict()
    assert_read_as_torch_does(save(state, tmp_path / "state.pt", zipped=zipped))
    parameters = read_torch_file(save({"p": dict(module.named_parameters())}, tmp_path / "p.pt", zipped=zipped))
    assert_same(parameters["p"], dict(module.named_parameters()))


@LAYOUTS
def test_nested_config_of_plain_values(tmp_path, zipped):
    config = {
        "text": "é|\n",
        "numbers": [0, 255, 256, 65536, -1, 2**40, -(2**70), 1.5, float("inf")],
        "flags": (True, False, None),
        "deeper": OrderedDict(one=(), two=(1,), three=(1, 2), four=(1, 2, 3), five=(1, 2, 3, 4)),
        "shape": torch.ones(2, 3).shape,
        3: {(1, "a"): []},
    }
    assert_read_as_torch_does(save({"cfg": config, "model": {"w": torch.ones(2)}}, tmp_path / "c.pt", zipped=zipped))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path, protocol):
    value = {"w": torch.ones(3), "cfg": {"x": [1, "a" * 300, (2, 3), 7.5]}}
    torch.save(value, tmp_path / "p.pt", pickle_protocol=protocol)
    assert_read_as_torch_does(tmp_path / "p.pt")


def test_objects_of_foreign_classes_are_records(tmp_path):
    space = argparse.Namespace(encoder_layers=12, nested=argparse.Namespace(a=1))
    value = {"args": space, "loss": np.float64(2.5), "ids": {1, 2}, "raw": b"ab", "model": {"w": torch.ones(1)}}
    found = read_torch_file(save(value, tmp_path / "n.pt"))
    assert isinstance(found["args"], Inert)
    assert found["args"].kind == "argparse.Namespace"
    assert found["args"].state["encoder_layers"] == 12
    assert found["args"].state["nested"].state == {"a": 1}
    assert found["loss"].kind.endswith("multiarray.scalar")
    assert found["ids"].arguments == ([1, 2],)
    assert found["raw"].arguments == ("ab", "latin1")


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        hnp.arrays(st.sampled_from(["<f2", "<f4", "<f8", "<i8", "u1", "?"]), hnp.array_shapes(min_dims=0, max_side=4)),
        max_size=4,
    ),
    st.booleans(),
)
def test_any_arrays(tmp_path_factory, arrays, zipped):
    path = tmp_path_factory.mktemp("any") / "x.pt"
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert_read_as_torch_does(save(tensors, path, zipped=zipped))


def test_checksum_catches_one_flipped_bit(tmp_path):
    path = save({"first": torch.zeros(100), "second": torch.zeros(100)}, tmp_path / "w.pt")
    content = bytearray(path.read_bytes())
    offset = read_torch_file(path)["second"].storage.extent.offset
    content[offset + 17] ^= 4
    path.write_bytes(content)
    found = read_torch_file(path)
    found["first"].read()
    with pytest.raises(DamagedFile, match=r"w\.pt: storage 1 .*checksum"):
        found["second"].read()


def test_checksum_covers_the_pickle(tmp_path):
    """A bit there makes other shapes, or other values of the config."""
    path = save({"cfg": {"heads": 12}, "w": torch.zeros(6)}, tmp_path / "w.pt")
    content = bytearray(path.read_bytes())
    content[content.index(b"heads") + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"w\.pt: its pickle does not have the checksum"):
        read_torch_file(path)


def test_files_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"w": torch.arange(5.0)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_torch_file(path), {"w": torch.arange(5.0)})


def test_archives_in_zip64(tmp_path, monkeypatch):
    """Sizes and counts where files of more than 4 GiB have them."""
    value = {"w": torch.arange(500.0), "v": torch.ones(3)}
    path = save(value, tmp_path / "w.pt")
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    assert_same(read_torch_file(path), value)
    content = path.read_bytes()
    ending = struct.pack("<2H2LH", 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(content[: -len(ending)] + ending)
    assert_same(read_torch_file(path), value)
    path.write_bytes(content.replace(b"PK\6\6", b"PK\6\0")[: -len(ending)] + ending)
    with pytest.raises(DamagedFile, match="zip archive without a sound directory"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("opening", "closing"),
    [(b"]", b"a"), (b"}N", b"s"), (b"cargparse\nNamespace\n", b"\x85R")],
    ids=["lists", "dicts", "records"],
)
def test_very_deep_values_are_let_go_again(tmp_path, opening, closing):
    """Thirty thousand containers one inside the other: no recursion, neither on the way in nor when they are freed."""
    count = 30_000
    hostile.pickle_in_archive(tmp_path / "deep.pt", b"}N" + opening * count + b"N" + closing * count + b"s")
    assert list(read_torch_file(tmp_path / "deep.pt")) == [None]


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    path = save({"w": torch.arange(5000.0)}, tmp_path / "w.pt")
    found = read_torch_file(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DamagedFile, match="storage 0 is cut off"):
        found["w"].read()


def test_big_endian_is_refused(tmp_path):
    path = save({"w": torch.arange(5.0)}, tmp_path / "w.pt")
    path.write_bytes(path.read_bytes().replace(b"little", b"bigend"))
    with pytest.raises(DamagedFile, match="big-endian"):
        read_torch_file(path)


@pytest.mark.parametrize("name", hostile.CODE)
def test_nothing_in_a_file_is_run(tmp_path, name):
    path, sentinel = tmp_path / "attack.pt", tmp_path / "sentinel"
    hostile.CODE[name](path, sentinel)
    with pytest.raises(FAULTS, match=r"attack\.pt: "):
        read_torch_file(path)
    assert not sentinel.exists()


def test_the_refused_name_is_told(tmp_path):
    hostile.code_in_config(tmp_path / "a.pt", tmp_path / "sentinel")
    with pytest.raises(HostileFile, match=r"a\.pt: asks for 'posix\.system'"):
        read_torch_file(tmp_path / "a.pt")


@pytest.mark.parametrize("name", hostile.LIES)
def test_claims_are_refused(tmp_path, name):
    path = tmp_path / "lie.pt"
    hostile.pickle_in_archive(path, hostile.LIES[name])
    with pytest.raises(FAULTS, match=r"lie\.pt: "):
        read_torch_file(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../outside", "archive/../../x", "..\\x"])
def test_members_that_lead_out_are_refused(tmp_path, name):
    hostile.escaping_member(tmp_path / "e.pt", name)
    with pytest.raises(HostileFile, match="leads out of the archive"):
        read_torch_file(tmp_path / "e.pt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (hostile.zip_bomb, "is compressed"),
        (hostile.overlapping_members, "overlap"),
        (hostile.many_members, "an archive of 4294967296 files"),
    ],
)
def test_archives_that_lie(tmp_path, make, message):
    make(tmp_path / "z.pt")
    with pytest.raises(HostileFile, match=message):
        read_torch_file(tmp_path / "z.pt")


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\3\4", b"not a checkpoint", b"\x93NUMPY", b"\x80\x02}."])
def test_other_files(tmp_path, content):
    (tmp_path / "o.pt").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"o\.pt: "):
        read_torch_file(tmp_path / "o.pt")


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(DamagedFile, match="is not a plain file"):
        read_torch_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "missing.pt")


def outcome(path: Path) -> list[tuple[int, ...]] | ValueError:
    """Shapes of all tensors of a flat state dict, after reading them, or the clean error that came instead."""
    try:
        value = read_torch_file(path)
        tensors = value.values() if isinstance(value, dict) else ()
        return [tensor.read().shape for tensor in tensors if isinstance(tensor, LazyTensor)]
    except FAULTS as error:
        return error


SHAPES = [(4, 3), (3, 4), (7,), (2, 2)]


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory) -> dict[bool, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    state = OrderedDict((f"layer.{i}", torch.arange(float(np.prod(s))).reshape(s)) for i, s in enumerate(SHAPES))
    return {zipped: save(state, folder / "s.pt", zipped=zipped).read_bytes() for zipped in (True, False)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), zipped=st.booleans())
def test_truncated_anywhere(tmp_path, sound_files, share, zipped):
    content = sound_files[zipped]
    path = tmp_path / "t.pt"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FAULTS, match=r"t\.pt: "):
        read_torch_file(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), zipped=st.booleans())
def test_flipped_bytes(tmp_path, sound_files, data, zipped):
    """Either a clean error or tensors: never another exception, never more numbers than the file has."""
    content = bytearray(sound_files[zipped])
    places = st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "f.pt"
    path.write_bytes(content)
    found = outcome(path)
    if isinstance(found, ValueError):
        assert "f.pt: " in str(found)
    else:
        assert sum(4 * int(np.prod(shape)) for shape in found) <= 2 * len(content)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=80)
    | st.lists(st.sampled_from(b"()]}tleads012NqhRbQ\x81\x85\x86\x87\x94\x93\x8f\x90"), max_size=60).map(bytes)
)
def test_any_pickle_at_all(tmp_path, content):
    path = tmp_path / "any.pt"
    hostile.pickle_in_archive(path, content)
    found = outcome(path)
    assert not isinstance(found, ValueError) or "any.pt: " in str(found)


MEASURE = """
import resource, sys
from pathlib import Path
import numpy, ml_dtypes
from wavlm_jax.files import DamagedFile, HostileFile
from wavlm_jax.convert.torch_file import read_torch_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    total = sum(float(tensor.read().sum()) for tensor in read_torch_file(Path(sys.argv[1])).values())
except (DamagedFile, HostileFile) as error:
    print("refused", error, file=sys.stderr)
assert "torch" not in sys.modules and "pickle" not in vars(sys.modules["wavlm_jax.convert.torch_file"])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def peak_growth(path: Path) -> int:
    """Bytes by which a fresh process grows while it reads all tensors of a file, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return int(done.stdout)


@LAYOUTS
def test_memory_holds_one_tensor_at_a_time(tmp_path, zipped):
    tensors = {str(i): torch.full((2**20,), float(i)) for i in range(30)}
    path = save(tensors, tmp_path / "big.pt", zipped=zipped)
    assert path.stat().st_size > 120e6
    assert peak_growth(path) < 16e6


@pytest.mark.parametrize(
    "name", ["zip_bomb", "shape_of_10^12", "storage_of_10^12", "stretched_by_strides_0", "huge_string_8"]
)
def test_memory_of_a_hostile_file(tmp_path, name):
    path = tmp_path / "h.pt"
    if name == "zip_bomb":
        hostile.zip_bomb(path)
    else:
        hostile.pickle_in_archive(path, hostile.LIES[name])
    assert peak_growth(path) < 16e6


def test_copies_cannot_be_multiplied(tmp_path):
    """A pickle that hands one long list over and over to a container's constructor stays as small as it is."""
    items = b"](" + b"K\x01K\x02\x86" * 20_000 + b"e"
    calls = b"ccollections\nOrderedDict\nq\x01" + items + b"\x85q\x02" + b"(" + b"h\x01h\x02R" * 20_000 + b"t"
    hostile.pickle_in_archive(tmp_path / "m.pt", calls)
    with pytest.raises(DamagedFile, match="makes no sense"):
        read_torch_file(tmp_path / "m.pt")


def test_millions_of_objects(tmp_path):
    hostile.pickle_in_archive(tmp_path / "o.pt", b"(" + b"}" * 5_000_000 + b"t")
    assert peak_growth(tmp_path / "o.pt") < 250e6


@pytest.mark.parametrize(
    "made",
    [
        *(b"\x8f", b"(\x91", b"]", b"}", b"N\x94", b"N\x85", b"\x8c\x02ab", b"h\x00)R", b"ctyping\nAny\n"),
        *(b"\x8f(K\x01K\x02K\x03\x90", b"}(K\x01NK\x02Nu", b"\x85", b"G12345678", b"\x8a\x02\x12\x34"),
    ],
    ids=repr,
)
def test_memory_is_bounded_by_the_size_of_the_file(tmp_path, monkeypatch, made):
    monkeypatch.setattr(pickle_machine, "_FREE_BYTES", 2**16)
    path = tmp_path / "o.pt"
    hostile.pickle_in_archive(path, b"(cargparse\nNamespace\nq\x00" + made * (8_000 // len(made)) + b"t")
    limit = 2**16 + 16 * path.stat().st_size
    tracemalloc.start()
    outcome(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.25 * limit
