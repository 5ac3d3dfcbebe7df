"""The weights of a Hugging Face folder, whole or in shards, as safetensors or as torch's pickles, found by looking."""

from collections.abc import Callable
from pathlib import Path, PurePath

from wavlm_jax.convert.json_files import read_json
from wavlm_jax.convert.names import ConversionError, current_name
from wavlm_jax.convert.safetensors_file import open_safetensors
from wavlm_jax.convert.source import Source
from wavlm_jax.convert.state_dict import source_of, tensors_of
from wavlm_jax.convert.torch_file import read_torch_file

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
_MOST_SHARDS = 10_000


def open_weights(folder: Path) -> tuple[Path, dict[str, Source]]:
    """The file (or index) that was taken, and its tensors by name, weight norm in the current spelling.

    Raises:
        FileNotFoundError: no weights; the message says what the folder has.
        DamagedFile, HostileFile: a file that is not what it should be.
        ConversionError: an index that does not match its shards, or a tensor that is there twice.

    """
    for name, reader in ((WEIGHTS, open_safetensors), (PICKLED, _open_pickled)):
        if (folder / name).is_file():
            return folder / name, _current(reader(folder / name), folder / name)
        if (folder / (name + INDEX)).is_file():
            index = folder / (name + INDEX)
            return index, _current(_open_shards(index, reader), index)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".safetensors", ".h5", ".msgpack"))
    raise FileNotFoundError(f"{folder / WEIGHTS}: no such file; the folder has {', '.join(others) or 'no weights'}")


def _open_pickled(path: Path) -> dict[str, Source]:
    return {name: source_of(name, tensor) for name, tensor in tensors_of(read_torch_file(path), path).items()}


def _open_shards(index: Path, reader: Callable[[Path], dict[str, Source]]) -> dict[str, Source]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ConversionError(f"{index}: weight_map is no map from tensors to files")
    shards = sorted(set(where.values()))
    if len(shards) > _MOST_SHARDS:
        raise ConversionError(f"{index}: names {len(shards)} files, expected at most {_MOST_SHARDS}")
    found: dict[str, Source] = {}
    for shard in shards:
        if PurePath(shard).name != shard or "\\" in shard or "\0" in shard:
            raise ConversionError(f"{index}: names the file {shard[:80]!r}, which leads out of the folder")
        sources = reader(index.parent / shard)
        if twice := sorted(found.keys() & sources.keys()):
            raise ConversionError(f"{index}: {twice[0]} is in two files, one of them {shard}")
        found |= sources
    missing = sorted({current_name(name) for name in where} - {current_name(name) for name in found})
    if missing:
        raise ConversionError(f"{index}: {missing[0]} is in none of its files ({len(missing)} missing)")
    return found


def _current(found: dict[str, Source], path: Path) -> dict[str, Source]:
    named = {current_name(name): source for name, source in found.items()}
    if len(named) != len(found):
        raise ConversionError(f"{path}: holds weight norm in both spellings")
    return named
