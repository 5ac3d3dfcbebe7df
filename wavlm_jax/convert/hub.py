"""Models of the Hugging Face hub by name: from the local cache, else over the network, through huggingface_hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from wavlm_jax.convert.shards import INDEX, PICKLED, WEIGHTS

_NAME = re.compile(r"([\w.-]+/)?[\w.-]+(@[\w./-]+)?")
_SMALL = ["*.json"]
_SAFE = ["model*.safetensors", "pretraining_head.safetensors"]
_LEGACY = ["pytorch_model*.bin"]


def is_hub_name(text: str) -> bool:
    """Whether it can be "organisation/model", or that with "@revision" behind."""
    return re.fullmatch(_NAME, text) is not None and "/" in text


def fetch(name: str) -> Path:
    """The folder of a model of the hub: config, vocabulary, and safetensors, or pytorch_model.bin where there are none.

    Args:
        name: "microsoft/wavlm-base-plus", or with a revision, "microsoft/wavlm-base-plus@main".

    Raises:
        ValueError: not in the cache and not to be had; the message says why and what to do.

    """
    repository, _, revision = name.partition("@")
    try:
        return _snapshot(repository, revision or None, local_files_only=True)
    except (LocalEntryNotFoundError, FileNotFoundError):
        pass
    try:
        return _snapshot(repository, revision or None, local_files_only=False)
    except (OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(
            f"{name}: no such file or folder here, not in Hugging Face's cache, and not to be had from the hub "
            f"({reason}). Check the name; without a network, download it elsewhere ('hf download {repository}') and "
            "give the folder"
        ) from error


def _snapshot(repository: str, revision: str | None, *, local_files_only: bool) -> Path:
    """The folder with all that is wanted of it.

    Raises:
        FileNotFoundError: it has no weights.

    """

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
        )

    folder = download(_SMALL + _SAFE)
    if not _has(folder, WEIGHTS):
        folder = download(_SMALL + _LEGACY)
    if not _has(folder, WEIGHTS) and not _has(folder, PICKLED):
        raise FileNotFoundError(f"{repository}: has neither {WEIGHTS} nor {PICKLED}")
    return folder


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / (name + INDEX)).is_file()
