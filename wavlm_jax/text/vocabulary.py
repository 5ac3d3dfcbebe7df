"""The vocabulary of a CTC model: characters to ids and back (FACTS B7, E33, E34), and its files at Hugging Face.

Made from the training text, or read from vocab.json, tokenizer_config.json, special_tokens_map.json and
added_tokens.json. What is written here `Wav2Vec2CTCTokenizer.from_pretrained(folder)` reads (of phones,
`Wav2Vec2PhonemeCTCTokenizer`). The blank is a named token, not id 0 by assumption: Hugging Face calls it `<pad>`,
fairseq `<s>`. Texts are read in Unicode's normal form C, without invisible characters (docs/parity.md).
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from wavlm_jax.files import read_json, write_bytes
from wavlm_jax.settings import read

BLANK, BEGIN, END, UNKNOWN, DELIMITER = "<pad>", "<s>", "</s>", "<unk>", "|"
"""The first five tokens (ids 0 to 4) of a vocabulary made from text, as in the English models on the hub."""

_NO_TOKEN = re.compile(r"<no token \d+>")
"""What stands for an output of a head that its vocabulary has no token for."""

_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Control characters that are no white space, and Unicode's Default_Ignorable_Code_Point: zero-width spaces, joiners,
soft hyphens, byte order marks, directions, variation selectors."""


class VocabularyError(ValueError):
    """A vocabulary, or a file of one, that is impossible; the message names it."""


class UnknownCharactersError(ValueError):
    """A text with `characters` that the vocabulary does not have."""

    def __init__(self, text: str, characters: tuple[str, ...]) -> None:
        listed = ", ".join(f"{character!r} (U+{ord(character[0]):04X})" for character in characters[:20])
        more = f" and {len(characters) - 20} more" if len(characters) > 20 else ""  # noqa: PLR2004
        super().__init__(
            f"text {text[:60]!r}: found {listed}{more}, which the vocabulary does not have; clean the text, build the "
            "vocabulary from it, or ask for unknown characters to be replaced"
        )
        self.characters = characters


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens by id, and the roles of special ones. Immutable and hashable.

    A token is a character, a unit of several characters that belong together ("CH"), or one of the special tokens.
    """

    tokens: tuple[str, ...]
    """tokens[i] has id i; as many as the CTC head has outputs."""
    blank: str = BLANK
    """CTC's blank. Its id is `blank_id`."""
    delimiter: str | None = DELIMITER
    """The token between words; a space in texts. None: a language without spaces."""
    unknown: str | None = UNKNOWN
    """Stands for characters that are not in the vocabulary. None: they cannot be replaced."""
    begin: str | None = BEGIN
    end: str | None = END
    """Never in labels; models on the hub have outputs for them."""
    do_lower_case: bool = False
    """As in Hugging Face: `encode` reads text in the case of the tokens, upper where they have both, and `spell` gives
    it in lower case."""
    phones: bool = False
    """As in Hugging Face's Wav2Vec2PhonemeCTCTokenizer: texts have a space between two tokens, and the delimiter, if
    there is one, is heard but not shown."""

    def __post_init__(self) -> None:
        doubled = [token for token, count in Counter(self.tokens).items() if count > 1]
        if doubled:
            raise VocabularyError(f"vocabulary: found {', '.join(map(repr, doubled[:5]))} twice, expected each once")
        if any(not token for token in self.tokens):
            raise VocabularyError(f"vocabulary: token {self.tokens.index('')} is empty, expected at least a character")
        for role in ("blank", "delimiter", "unknown", "begin", "end"):
            token = getattr(self, role)
            if token is not None and token not in self._ids:
                raise VocabularyError(
                    f"vocabulary: {role} is {token!r}, which is none of the {len(self.tokens)} tokens; add it"
                    + ("" if role == "blank" else f", or say {role}=None")
                )
        roles = [role for role in (self.blank, self.delimiter, self.unknown) if role is not None]
        if len(set(roles)) < len(roles):
            raise VocabularyError(f"vocabulary: blank, delimiter and unknown are {roles}, expected different tokens")

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, min_count: int = 1, do_lower_case: bool = False) -> "Vocabulary":
        """The vocabulary of a training text: special tokens first, then characters, the most frequent first.

        Args:
            texts: transcripts; any white space is a space between words.
            min_count: characters seen less often are left out (`count_characters` shows how often).
            do_lower_case: ignore case; tokens are upper case, decoded text is lower case.

        Raises:
            VocabularyError: no character is left, or the text has the word delimiter as a character.

        """
        counts = count_characters(texts, upper=do_lower_case)
        if DELIMITER in counts:
            raise VocabularyError(
                f"vocabulary: the text has {DELIMITER!r} {counts[DELIMITER]} times, which stands between words here; "
                "remove it from the text"
            )
        characters = sorted(
            (c for c, n in counts.items() if n >= min_count), key=lambda character: (-counts[character], character)
        )
        if not characters:
            raise VocabularyError(
                f"vocabulary: found {len(counts)} characters, none of them {min_count} times or more; are the texts "
                "empty?"
            )
        return cls(tokens=(BLANK, BEGIN, END, UNKNOWN, DELIMITER, *characters), do_lower_case=do_lower_case)

    @property
    def blank_id(self) -> int:
        """The id of CTC's blank."""
        return self._ids[self.blank]

    @property
    def delimiter_id(self) -> int | None:
        """The id between words."""
        return None if self.delimiter is None else self._ids[self.delimiter]

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids without a character: blank, unknown, begin, end, no token (not the delimiter, which is a space)."""
        special = (self.blank, self.unknown, self.begin, self.end)
        return frozenset(self._ids[token] for token in special if token is not None) | self._without_token

    @cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Ids that a text does not show: the blank, and between phones the delimiter."""
        hidden = {self.blank_id} if self.delimiter_id is None or not self.phones else {self.blank_id, self.delimiter_id}
        return frozenset(hidden)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all fields; `phones` only where it is set, so that older runs keep theirs."""
        fields = {name: value for name, value in asdict(self).items() if name != "phones" or value}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def unknown_characters(self, text: str) -> tuple[str, ...]:
        """The characters of `text` that have no token, each once, in order."""
        return self._strange(self._pieces(text))

    def encode(self, text: str, *, replace_unknown: bool = False) -> Int32[np.ndarray, "labels"]:
        """The labels of `text`: one id per character (or unit, or phone), the delimiter between words, no blank.

        White space at the ends is dropped; elsewhere any amount of it is one space. Invisible characters are left out,
        and the text is read in normal form C, unless the vocabulary has the character, or spells in another form.

        Args:
            text: a transcript.
            replace_unknown: replace a character without a token by the unknown token, as in Hugging Face.

        Raises:
            UnknownCharactersError: unless `replace_unknown`.

        """
        pieces = self._pieces(text)
        unknown = self._strange(pieces)
        if unknown and (not replace_unknown or self.unknown is None):
            raise UnknownCharactersError(text, unknown)
        stand_in = self.blank_id if self.unknown is None else self._ids[self.unknown]
        return np.array([self._spelling.get(piece, stand_in) for piece in pieces], np.int32)

    def show(self, token_id: int) -> str:
        """Token `token_id` as text: a space for the delimiter, nothing for the blank.

        Raises:
            VocabularyError: there is no such id.

        """
        if not 0 <= token_id < len(self.tokens):
            raise VocabularyError(f"id {token_id}: found in a vocabulary of {len(self.tokens)} tokens, expected less")
        token = self.tokens[token_id]
        if token == self.blank:
            return ""
        return " " if token == self.delimiter else token

    def known(self, ids: Sequence[int] | Int[np.ndarray, "labels"]) -> list[int]:
        """`ids`, those of outputs without a token as the unknown token, which is how transformers reads them."""
        stand_in = self.blank_id if self.unknown is None else self._ids[self.unknown]
        return [stand_in if number in self._without_token else number for number in np.asarray(ids, np.int64).tolist()]

    def spell(self, ids: Sequence[int] | Int[np.ndarray, "labels"]) -> str:
        """The text of labels. Nothing is collapsed; that is `wavlm_jax.text.decoding`."""
        shown = self.show_all([number for number in self.known(ids) if number not in self.hidden_ids])
        return (" " if self.phones else "").join(shown).strip()

    def show_all(self, ids: Sequence[int]) -> list[str]:
        """What each of `ids` adds to a text. Case follows the whole text: the last sigma of a word is another letter.

        Raises:
            VocabularyError: there is no such id.

        """
        shown = [self.show(token_id) for token_id in ids]
        if not self.do_lower_case:
            return shown
        lowered = "".join(shown).lower()  # as long as its letters lowered one by one
        ends = np.cumsum([0, *(len(text.lower()) for text in shown)])
        return [lowered[start:end] for start, end in pairwise(ends)]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    @cached_property
    def _without_token(self) -> frozenset[int]:
        return frozenset(number for number, token in enumerate(self.tokens) if _NO_TOKEN.fullmatch(token))

    @cached_property
    def _spelling(self) -> dict[str, int]:
        """Character (or unit) of a text -> id."""
        special = self.special_ids | ({self.delimiter_id} if self.delimiter_id is not None else set())
        spelling = {token: number for token, number in self._ids.items() if number not in special}
        if self.delimiter is not None:
            spelling[self.delimiter if self.phones else " "] = self._ids[self.delimiter]
        return spelling

    @cached_property
    def _splitter(self) -> re.Pattern[str]:
        units = sorted((token for token in self._spelling if len(token) > 1), key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, units), "."]), re.DOTALL)

    @cached_property
    def _letters(self) -> frozenset[str]:
        return frozenset("".join(self._spelling))

    @cached_property
    def _forms(self) -> tuple[Callable[[str], str], ...]:
        """Ways to write a text: the first is taken, unless another alone has no unknown character.

        Where tokens are not in normal form C themselves (letters of Indic scripts that it takes apart), a text that
        is written as they are comes first.
        """
        forms = partial(unicodedata.normalize, "NFC"), str, partial(unicodedata.normalize, "NFD")
        composed = all(unicodedata.is_normalized("NFC", token) for token in self._spelling)
        return forms if composed else (str, forms[0], forms[2])

    def _pieces(self, text: str) -> list[str]:
        """Characters and units, the longest unit first, and one space between words; or phones."""
        text = _INVISIBLE.sub(lambda found: found[0] if found[0] in self._letters else "", text)
        text = self._in_case(unicodedata.normalize("NFC", text)) if self.do_lower_case else text
        first = self._cut(self._forms[0](text))
        if not self._strange(first):
            return first
        others = (self._cut(form(text)) for form in self._forms[1:])
        return next((pieces for pieces in others if not self._strange(pieces)), first)

    def _cut(self, text: str) -> list[str]:
        if self.phones:
            return text.split()
        between = "" if self.delimiter is None and " " not in self._spelling else " "
        return self._splitter.findall(between.join(text.split()))

    def _strange(self, pieces: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(piece for piece in pieces if piece not in self._spelling))

    def _in_case(self, text: str) -> str:
        """`text` in the case of the tokens; a letter that they have in the other case only is one in that case."""
        letters = self._letters
        text = text.upper() if any(letter != letter.lower() for letter in letters) else text.lower()
        others = ((c.lower(), c.upper().lower()) for c in text)  # the second: the last sigma of a word
        return "".join(
            c if c in letters else next((other for other in pair if other in letters), c)
            for c, pair in zip(text, others, strict=True)
        )


def count_characters(texts: Iterable[str], *, upper: bool = False) -> Counter[str]:
    """How often each character occurs in the `normal_form` of `texts`, white space left out."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update("".join(normal_form(text.upper() if upper else text).split()))
    return counts


def normal_form(text: str) -> str:
    """`text` in Unicode's normal form C, without invisible characters."""
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", text))


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
"""Our name -> Hugging Face's, and the token that transformers assumes if no file names one."""
_PHONES = "Wav2Vec2PhonemeCTCTokenizer"


def read_vocabulary(folder: Path, language: str | None = None) -> Vocabulary:
    """The vocabulary of a Hugging Face folder (a tokenizer, a processor, or a model with a CTC head).

    Args:
        folder: has vocab.json and, where needed, the other files; config.json, if it is a CTC model's, says how many
            outputs there are.
        language: which part of a multilingual vocabulary (None: the one that tokenizer_config.json names).

    Raises:
        VocabularyError: a damaged or impossible file; the message names it.

    """
    model = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    outputs = model.get("vocab_size") if "ForCTC" in str(model.get("architectures")) else None
    num_outputs = outputs if isinstance(outputs, int) and 0 < outputs <= MOST_TOKENS else None
    return parse_vocabulary(tokenizer_files(folder), folder, language, num_outputs=num_outputs)


def files_of_record(values: Any) -> dict[str, bytes]:
    """`files_of` the vocabulary in the resolved config of a run, which has the fields of `Vocabulary`.

    Raises:
        SettingsError: other fields.

    """
    return files_of(read(values, Vocabulary, "vocabulary"))


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of the tokenizer files that exist in `folder`.

    Raises:
        VocabularyError: a file that is too large for a vocabulary.

    """
    found = {}
    for path in (folder / name for name in (VOCABULARY, SETTINGS, SPECIAL, ADDED)):
        if path.is_file():
            if path.stat().st_size > MOST_BYTES:
                raise VocabularyError(f"{path}: {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
            found[path.name] = path.read_bytes()
    return found


def parse_vocabulary(
    files: Mapping[str, bytes], folder: Path, language: str | None = None, *, num_outputs: int | None = None
) -> Vocabulary:
    """The vocabulary in these files.

    Args:
        files: name -> content (`tokenizer_files`).
        folder: where they come from, for messages.
        language: see `read_vocabulary`.
        num_outputs: of the CTC head. Special and added tokens beyond them are left out, as transformers adds them by
            itself; outputs without a token, at most a third of all, are spelt as the unknown token, as there. None:
            every id has a token.

    Raises:
        VocabularyError: see `read_vocabulary`.

    """
    if VOCABULARY not in files:
        raise VocabularyError(f"{folder / VOCABULARY}: no such file; expected the folder of a CTC tokenizer")
    parsed = {name: _parse(content, folder / name) for name, content in files.items()}
    stored = parsed[VOCABULARY]
    settings, special, extra = (parsed.get(name, {}) for name in (SETTINGS, SPECIAL, ADDED))
    ids = _of_language(stored, language or settings.get("target_lang"), folder / VOCABULARY)
    added = _added(extra, settings, folder)
    ids |= {token: number for token, number in added.items() if token not in ids}
    phones = settings.get("tokenizer_class") == _PHONES
    if phones:
        settings = {"word_delimiter_token": None} | settings
    roles = {ours: _role(ours, settings, special, folder) for ours in _ROLES}
    if num_outputs is not None:
        ids = _fitting(ids, {*added, *roles.values()}, num_outputs, folder / VOCABULARY)
    tokens = _in_order(ids, folder / VOCABULARY)
    for role in ("delimiter", "unknown", "begin", "end"):
        if roles[role] not in ids:
            roles[role] = None  # transformers would add an id that the head has no output for
    try:
        lower = _flag(settings, "do_lower_case", folder / SETTINGS) and not phones
        return Vocabulary(tokens=tokens, do_lower_case=lower, phones=phones, **roles)
    except VocabularyError as error:
        raise VocabularyError(f"{folder}: {error}") from error


def write_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write vocab.json and tokenizer_config.json into `folder`, which is made; files of these names are replaced."""
    for name, content in files_of(vocabulary).items():
        write_bytes(folder / name, content)


def files_of(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Name -> content of the files of this vocabulary in Hugging Face's format."""
    settings: dict[str, Any] = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "do_lower_case": vocabulary.do_lower_case,
        "replace_word_delimiter_char": " ",
        "clean_up_tokenization_spaces": False,
        "target_lang": None,
    }
    settings |= {theirs: getattr(vocabulary, ours) for ours, (theirs, _) in _ROLES.items()}
    if vocabulary.phones:
        settings |= {"tokenizer_class": _PHONES, "do_phonemize": False, "phone_delimiter_token": " "}
    elif vocabulary.delimiter is None:
        del settings["word_delimiter_token"]  # null makes transformers fail on every text with a space
    ids = {token: number for number, token in enumerate(vocabulary.tokens) if not _NO_TOKEN.fullmatch(token)}
    return {
        name: (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode()
        for name, values in ((VOCABULARY, ids), (SETTINGS, settings))
    }


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise VocabularyError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise VocabularyError(f"{path}: found a {type(values).__name__}, expected an object")
    return values


def _of_language(stored: dict[str, Any], language: str | None, path: Path) -> dict[str, Any]:
    """Token -> id; in a multilingual file, of one language."""
    nested = {name for name, value in stored.items() if isinstance(value, dict)}
    if not nested:
        return dict(stored)
    if language not in nested:
        known = ", ".join(sorted(nested)[:10]) + (", ..." if len(nested) > 10 else "")  # noqa: PLR2004
        raise VocabularyError(f"{path}: has {len(nested)} languages, found {language!r}; expected one of {known}")
    return dict(stored[language])


def _added(added: dict[str, Any], settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Tokens outside vocab.json: of added_tokens.json (old) and of the key added_tokens_decoder (new)."""
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise VocabularyError(f"{folder / SETTINGS}: added_tokens_decoder is {decoder!r}, expected an object")
    for number, token in decoder.items():
        if not (isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdecimal()):
            raise VocabularyError(f"{folder / SETTINGS}: added_tokens_decoder has {number!r}: {token!r}")
        added.setdefault(token["content"], int(number))
    return added


def _fitting(ids: Mapping[str, Any], special: set[Any], num_outputs: int, path: Path) -> dict[str, Any]:
    """Token -> id of the tokens that a head with so many outputs has, and of what stands for outputs without one."""
    fitting = {token: number for token, number in ids.items() if not isinstance(number, int) or number < num_outputs}
    ordinary = [token for token in ids if token not in fitting and token not in special]
    lacking = {*range(num_outputs)}.difference(number for number in fitting.values() if isinstance(number, int))
    if ordinary or len(lacking) > num_outputs // 3:
        first = f", {ordinary[0]!r} has id {ids[ordinary[0]]}" if ordinary else ""
        raise VocabularyError(
            f"{path}: has {len(ids)} tokens, the model {num_outputs} outputs{first}; it belongs to another model"
        )
    return fitting | {f"<no token {number}>": number for number in lacking}


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
    """The token of a role: from tokenizer_config.json, else special_tokens_map.json, else transformers' default."""
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
