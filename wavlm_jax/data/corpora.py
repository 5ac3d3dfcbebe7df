"""The corpora that a config names: one to learn from, any number to evaluate on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from wavlm_jax.data.corpus import Corpus

__all__ = ["Corpora", "Corpus", "DataSettings", "open_corpora"]

Corpora: TypeAlias = dict[str, Corpus]
"""By split, `train` first."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The config section `data`: folders that `python -m wavlm_jax.data` prepared."""

    train: str
    evaluation: tuple[str, ...]
    """A split is called what its folder is called: corpora/demo/valid is `valid`."""
    evaluation_buckets: tuple[int, ...]
    """Frames that held-out utterances are padded to; longer ones are cut to the last."""

    def __post_init__(self) -> None:
        names = ["train", *(Path(path).name for path in self.evaluation)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(
                f"evaluation: two folders are called {min(twice)!r}; expected distinct names, none `train`"
            )

    @property
    def folders(self) -> dict[str, Path]:
        """Folder of each split, `train` first."""
        return {"train": Path(self.train), **{Path(path).name: Path(path) for path in self.evaluation}}


def open_corpora(settings: DataSettings) -> Corpora:
    """The corpus of each split, `train` first.

    Raises:
        FileNotFoundError: where a folder holds no corpus, with the command that makes one.

    """
    for split, folder in settings.folders.items():
        if not (folder / "header.json").is_file():
            raise FileNotFoundError(
                f"config.data: {split} is {folder}, where there is no corpus (no header.json); make one with: "
                f"python -m wavlm_jax.data SOURCE --out {folder}"
            )
    return {split: Corpus.open(folder) for split, folder in settings.folders.items()}
