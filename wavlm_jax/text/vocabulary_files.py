"""Vocabularies as Hugging Face stores them: vocab.json, tokenizer_config.json, special_tokens_map.json, in and out.

What is written, `Wav2Vec2CTCTokenizer.from_pretrained(folder)` reads; the pad token there is the blank here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wavlm_jax.settings import read
from wavlm_jax.text.vocabulary import (
    BEGIN,
    BLANK,
    DELIMITER,
    END,
    UNKNOWN,
    Vocabulary,
    VocabularyError,
)
from wavlm_jax.whole_file import replacing

VOCABULARY, SETTINGS = "vocab.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
MOST_BYTES = 64 << 20
MOST_TOKENS = 1 << 20

_ROLES = {
    "blank": ("pad_token", BLANK),
    "delimiter": ("word_delimiter_token", DELIMITER),
    "unknown": ("unk_token", UNKNOWN),
    "begin": ("bos_token", BEGIN),
    "end": ("eos_token", END),
}
"""Our name -> Hugging Face's, and the token that transformers assumes where no file names one."""


def read_vocabulary(folder: Path, language: str | None = None) -> Vocabulary:
    """The vocabulary of a Hugging Face folder (a tokenizer, a processor, or a model with a CTC head).

    Args:
        folder: holds vocab.json, and tokenizer_config.json, special_tokens_map.json and added_tokens.json where needed.
        language: which part of a vocabulary of many languages (None: the one that tokenizer_config.json names).

    Raises:
        VocabularyError: a damaged or impossible file, named, with what was found and expected.

    """
    return parse_vocabulary(tokenizer_files(folder), folder, language)


def files_of_record(values: Any) -> dict[str, bytes]:
    """Name -> content of the files that say the vocabulary in the config of a run: the fields of `Vocabulary`.

    Raises:
        SettingsError: other fields than these.

    """
    return files_of(read(values, Vocabulary, "vocabulary"))


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files that `folder` has of a tokenizer.

    Raises:
        VocabularyError: one that is too large to be a vocabulary.

    """
    found = {}
    for path in (folder / name for name in (VOCABULARY, SETTINGS, SPECIAL, ADDED)):
        if path.is_file():
            if path.stat().st_size > MOST_BYTES:
                raise VocabularyError(f"{path}: {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
            found[path.name] = path.read_bytes()
    return found


def parse_vocabulary(files: Mapping[str, bytes], folder: Path, language: str | None = None) -> Vocabulary:
    """The vocabulary that these files say.

    Args:
        files: name -> content (`tokenizer_files`).
        folder: where they come from, for messages.
        language: see `read_vocabulary`.

    Raises:
        VocabularyError: see `read_vocabulary`.

    """
    if VOCABULARY not in files:
        raise VocabularyError(f"{folder / VOCABULARY}: no such file; expected the folder of a CTC tokenizer")
    parsed = {name: _parse(content, folder / name) for name, content in files.items()}
    stored = parsed[VOCABULARY]
    settings, special, extra = (parsed.get(name, {}) for name in (SETTINGS, SPECIAL, ADDED))
    ids = _of_language(stored, language or settings.get("target_lang"), folder / VOCABULARY)
    ids |= {token: number for token, number in _added(extra, settings, folder).items() if token not in ids}
    tokens = _in_order(ids, folder / VOCABULARY)
    roles = {ours: _role(ours, settings, special, folder) for ours in _ROLES}
    for role in ("delimiter", "unknown", "begin", "end"):
        if roles[role] not in ids:
            roles[role] = None  # transformers would add an id that the head has no output for
    try:
        lower = _flag(settings, "do_lower_case", folder / SETTINGS)
        return Vocabulary(tokens=tokens, do_lower_case=lower, **roles)
    except VocabularyError as error:
        raise VocabularyError(f"{folder}: {error}") from error


def write_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write vocab.json and tokenizer_config.json into `folder`, which is made; files of these names are replaced."""
    for name, content in files_of(vocabulary).items():
        with replacing(folder / name) as draft:
            draft.write_bytes(content)


def files_of(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Name -> content of the files that say this vocabulary."""
    settings: dict[str, Any] = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "do_lower_case": vocabulary.do_lower_case,
        "replace_word_delimiter_char": " ",
        "clean_up_tokenization_spaces": False,
        "target_lang": None,
    }
    settings |= {theirs: getattr(vocabulary, ours) for ours, (theirs, _) in _ROLES.items()}
    if vocabulary.delimiter is None:
        del settings["word_delimiter_token"]  # null makes transformers fail on every text with a space
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    return {
        name: (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode()
        for name, values in ((VOCABULARY, ids), (SETTINGS, settings))
    }


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(content.decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise VocabularyError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise VocabularyError(f"{path}: found a {type(values).__name__}, expected an object")
    return values


def _of_language(stored: dict[str, Any], language: str | None, path: Path) -> dict[str, Any]:
    """The tokens of one language, where the file has a part for each."""
    nested = {name for name, value in stored.items() if isinstance(value, dict)}
    if not nested:
        return dict(stored)
    if language not in nested:
        raise VocabularyError(
            f"{path}: has {len(nested)} languages, found {language!r}; expected one of {_few(nested)}"
        )
    return dict(stored[language])


def _added(added: dict[str, Any], settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Tokens that stand outside vocab.json, by name: those of the old file and of the new key."""
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise VocabularyError(f"{folder / SETTINGS}: added_tokens_decoder is {decoder!r}, expected an object")
    for number, token in decoder.items():
        if not (isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdecimal()):
            raise VocabularyError(f"{folder / SETTINGS}: added_tokens_decoder has {number!r}: {token!r}")
        added.setdefault(token["content"], int(number))
    return added


def _in_order(ids: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    if not ids or len(ids) > MOST_TOKENS:
        raise VocabularyError(f"{path}: has {len(ids)} tokens, expected 1 to {MOST_TOKENS}")
    by_id: dict[int, str] = {}
    for token, number in ids.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MOST_TOKENS:
            raise VocabularyError(f"{path}: token {token!r} has id {number!r}, expected a number from 0 on")
        if number in by_id:
            raise VocabularyError(f"{path}: {by_id[number]!r} and {token!r} both have id {number}")
        by_id[number] = token
    holes = [number for number in range(len(by_id)) if number not in by_id]
    if holes:
        raise VocabularyError(f"{path}: {len(by_id)} tokens, but none has id {holes[0]}; expected ids without a gap")
    return tuple(by_id[number] for number in range(len(by_id)))


def _role(ours: str, settings: Mapping[str, Any], special: Mapping[str, Any], folder: Path) -> Any:
    """Which token plays a part: tokenizer_config.json says, else special_tokens_map.json, else the usual one."""
    key, usual = _ROLES[ours]
    found = settings.get(key, special.get(key, usual))
    if isinstance(found, dict):
        found = found.get("content")
    if found is None and ours == "blank":
        raise VocabularyError(f"{folder}: {key} is null; CTC needs a blank, and Hugging Face's is the pad token")
    if found is not None and not isinstance(found, str):
        raise VocabularyError(f"{folder}: {key} is {found!r}, expected a token")
    return found


def _flag(settings: Mapping[str, Any], key: str, path: Path) -> bool:
    found = settings.get(key, False)
    if not isinstance(found, bool):
        raise VocabularyError(f"{path}: {key} is {found!r}, expected true or false")
    return found


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:10]) + (", ..." if len(names) > 10 else "")  # noqa: PLR2004
