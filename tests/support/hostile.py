"""Files that a stranger could send: pickles that want code run, and archives that lie about their size.

Every maker writes one file. `SENTINEL` is the file that their payload would create.
"""

import io
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


class Attack:
    """Pickles as a call of os.system."""

    def __init__(self, sentinel: Path) -> None:
        self.command = f"touch {sentinel}"

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def code_in_config(path: Path, sentinel: Path) -> None:
    torch.save({"cfg": Attack(sentinel), "model": {"w": torch.ones(2)}}, path)


def code_nested(path: Path, sentinel: Path) -> None:
    torch.save({"cfg": {"a": [({"b": OrderedDict(c=Attack(sentinel))},)]}, "model": {}}, path)


def code_in_tensor_slot(path: Path, sentinel: Path) -> None:
    torch.save({"cfg": {}, "model": OrderedDict(weight=Attack(sentinel))}, path)


def code_in_legacy_layout(path: Path, sentinel: Path) -> None:
    value = {"cfg": Attack(sentinel), "model": {"w": torch.ones(2)}}
    torch.save(value, path, _use_new_zipfile_serialization=False)


def bare_pickle(path: Path, sentinel: Path) -> None:
    path.write_bytes(pickle.dumps(Attack(sentinel), protocol=2))


def old_tar_layout(path: Path, sentinel: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = pickle.dumps(Attack(sentinel), protocol=2)
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<L", len(raw)) + raw


def _pickles(sentinel: Path) -> dict[str, bytes]:
    """Pickle programmes, each another way to get at os.system or at an object of a foreign class."""
    command = _text(f"touch {sentinel}")
    system, namespace = b"cposix\nsystem\n", b"cargparse\nNamespace\n"
    return {
        "reduce": system + command + b"\x85R",
        "stack_global": _text("posix") + _text("system") + b"\x93" + command + b"\x85R",
        "inst": b"(" + command + b"iposix\nsystem\n",
        "obj": b"(" + system + command + b"o",
        "newobj": system + command + b"\x85\x81",
        "newobj_ex": system + command + b"\x85}\x92",
        "setstate": b"ctypes\nSimpleNamespace\n)\x81}" + _text("__setstate__") + system + b"sb",
        "ext1": b"\x82\x01)R",
        "ext2": b"\x83\x01\x00)R",
        "ext4": b"\x84\x01\x00\x00\x00)R",
        "persistent_text_id": b"Pstorage\n",
        "persistent_id_is_text": _text("storage") + b"Q",
        "persistent_id_of_a_class": b"(" + _text("storage") + system + _text("0") + _text("cpu") + b"K\x01tQ",
        "persistent_module": b"(" + _text("module") + system + _text("0") + b"tQ",
        "eval": b"c__builtin__\neval\n" + _text("1+1") + b"\x85R",
        "getattr": b"cbuiltins\ngetattr\n" + namespace + _text("__init__") + b"\x86R",
        "dotted": b"cargparse\nNamespace.__init__.__globals__\n",
        "dotted_package": b"comegaconf\n.os.system\n" + command + b"\x85R",
        "call_of_a_type": b"cbuiltins\ndict\n" + b"]\x85R",
        "call_of_a_result": namespace + b")R" + command + b"\x85R",
        "call_of_text": _text("system") + command + b"\x85R",
    }


def pickle_in_archive(path: Path, content: bytes) -> None:
    """A file as `torch.save` writes it, with another pickle inside."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", np.zeros(4, np.float32).tobytes())


def _programme(name: str) -> Callable[[Path, Path], None]:
    def make(path: Path, sentinel: Path) -> None:
        pickle_in_archive(path, _pickles(sentinel)[name])

    return make


CODE: dict[str, Callable[[Path, Path], None]] = {
    "code_in_config": code_in_config,
    "code_nested": code_nested,
    "code_in_tensor_slot": code_in_tensor_slot,
    "code_in_legacy_layout": code_in_legacy_layout,
    "bare_pickle": bare_pickle,
    "old_tar_layout": old_tar_layout,
    **{name: _programme(name) for name in _pickles(Path())},
}
"""Name -> maker of a file that wants code run."""


def _tensor(count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A pickled float32 tensor on storage 0, whatever its numbers are worth."""

    def number(value: int) -> bytes:
        raw = value.to_bytes(12, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + number(count) + b"tQ"
    rest = number(offset) + numbers(shape) + numbers(strides) + b"\x89N"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


LIES: dict[str, bytes] = {
    "shape_of_10^12": _tensor(4, 0, (10**6, 10**6), (10**6, 1)),
    "stretched_by_strides_0": _tensor(4, 0, (10**6, 10**6), (0, 0)),
    "storage_of_10^12": _tensor(10**12, 0, (10**12,), (1,)),
    "stride_out_of_range": _tensor(4, 0, (2, 2), (1000, 1)),
    "negative_stride": _tensor(4, 3, (4,), (-1,)),
    "negative_offset": _tensor(4, -4, (4,), (1,)),
    "negative_size": _tensor(4, 0, (-1, -4), (4, 1)),
    "offset_out_of_range": _tensor(4, 2, (4,), (1,)),
    "size_and_stride_do_not_match": _tensor(4, 0, (4,), (1, 1)),
    "huge_string": b"X" + struct.pack("<L", 2**31),
    "huge_string_8": b"\x8d" + struct.pack("<Q", 2**40),
    "huge_number": b"\x8b" + struct.pack("<L", 2**20) + bytes(2**20),
    "deep": b"(" * 100_000,
    "deep_key": b"}" + b")" * 2 + b"\x86" + b"2\x86" * 60 + b"Ns",
    "list_as_key": b"}]Ns",
    "empty_stack": b"R",
    "missing_memo": b"h\x07",
    "two_values": b"NN",
}
"""Name -> pickle that claims what the file cannot hold, or that makes no sense. None of them needs memory to refuse."""


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + _tensor(2**26, 0, (2**26,), (1,)) + b".")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", bytes(2**28))


def overlapping_members(path: Path) -> None:
    """Every directory entry of `data/*` points to the same bytes: 1,000 storages for the price of one."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data/0", bytes(2**16))
        info = archive.infolist()[-1]
        for index in range(1, 1000):
            twin = zipfile.ZipInfo(f"archive/data/{index}")
            twin.file_size = twin.compress_size = info.file_size
            twin.CRC, twin.header_offset = info.CRC, info.header_offset
            archive.filelist.append(twin)


def escaping_member(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr(zipfile.ZipInfo(name), b"x")


def many_members(path: Path) -> None:
    """An end record that claims 4 billion members."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**32, 2**32, 2**40, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 4, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(b"PK\3\4" + record + locator + end)
