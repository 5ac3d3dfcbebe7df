"""The vocabulary of a CTC model: characters to ids and back, made from the training text (FACTS B7, E33, E34).

The blank is named, never assumed: Hugging Face calls it `<pad>`, fairseq `<s>`, both at id 0. What Hugging Face stores
of a vocabulary is read and written by `wavlm_jax.text.vocabulary_files`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int, Int32

BLANK, BEGIN, END, UNKNOWN, DELIMITER = "<pad>", "<s>", "</s>", "<unk>", "|"
"""The first five tokens of a vocabulary that is made here, ids 0 to 4: those of the English models on the hub."""


class VocabularyError(ValueError):
    """A vocabulary that cannot be right."""


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
    """Tokens by id, and the parts that some of them play. Immutable and hashable.

    A token is a character, a unit of several characters that belong together ("CH"), or one of the special tokens.
    """

    tokens: tuple[str, ...]
    """tokens[i] has id i; as many as the CTC head has outputs."""
    blank: str = BLANK
    """The token of "nothing here". Its id is `blank_id`."""
    delimiter: str | None = DELIMITER
    """The token between words, read and written as a space. None: a language without spaces."""
    unknown: str | None = UNKNOWN
    """Stands for characters that are not there. None: they cannot be replaced."""
    begin: str | None = BEGIN
    end: str | None = END
    """Never in labels; kept because models on the hub have outputs for them."""
    do_lower_case: bool = False
    """As in Hugging Face: text is upper-cased on the way in and lower-cased on the way out."""

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
            do_lower_case: `Cat` and `cat` are the same word, spelt with upper-case tokens and shown in lower case.

        Raises:
            VocabularyError: there is no character to learn, or the text uses the word delimiter as a character.

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
        """The id that CTC loss and decoding take as blank."""
        return self._ids[self.blank]

    @property
    def delimiter_id(self) -> int | None:
        """The id between words."""
        return None if self.delimiter is None else self._ids[self.delimiter]

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that spell nothing: blank, unknown, begin and end (not the delimiter, which spells a space)."""
        special = (self.blank, self.unknown, self.begin, self.end)
        return frozenset(self._ids[token] for token in special if token is not None)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that this vocabulary says."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def unknown_characters(self, text: str) -> tuple[str, ...]:
        """The characters of `text` that no token spells, each once, in order."""
        return tuple(dict.fromkeys(piece for piece in self._pieces(text) if piece not in self._spelling))

    def encode(self, text: str, *, replace_unknown: bool = False) -> Int32[np.ndarray, "labels"]:
        """The labels of `text`: one id a character (or unit), the delimiter between words, no blank.

        White space at the ends is dropped, any other stretch of it is one space.

        Args:
            text: a transcript.
            replace_unknown: the unknown token stands in for a character that is not there, as in Hugging Face.

        Raises:
            UnknownCharactersError: unless `replace_unknown`.

        """
        pieces = self._pieces(text)
        unknown = tuple(dict.fromkeys(piece for piece in pieces if piece not in self._spelling))
        if unknown and (not replace_unknown or self.unknown is None):
            raise UnknownCharactersError(text, unknown)
        stand_in = self.blank_id if self.unknown is None else self._ids[self.unknown]
        return np.array([self._spelling.get(piece, stand_in) for piece in pieces], np.int32)

    def show(self, token_id: int) -> str:
        """What token `token_id` looks like in a text: a space for the delimiter, nothing for the blank.

        Raises:
            VocabularyError: there is no such id.

        """
        if not 0 <= token_id < len(self.tokens):
            raise VocabularyError(f"id {token_id}: found in a vocabulary of {len(self.tokens)} tokens, expected less")
        token = self.tokens[token_id]
        if token == self.blank:
            return ""
        return " " if token == self.delimiter else token

    def spell(self, ids: Sequence[int] | Int[np.ndarray, "labels"]) -> str:
        """The text of labels. Nothing is collapsed: `wavlm_jax.text.ctc` does that to the output of a model."""
        text = "".join(self.show(int(token_id)) for token_id in ids).strip()
        return text.lower() if self.do_lower_case else text

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    @cached_property
    def _spelling(self) -> dict[str, int]:
        """What can be in a text, to its id."""
        parts = {self.blank, self.unknown, self.begin, self.end, self.delimiter}
        spelling = {token: number for token, number in self._ids.items() if token not in parts}
        if self.delimiter is not None:
            spelling[" "] = self._ids[self.delimiter]
        return spelling

    @cached_property
    def _splitter(self) -> re.Pattern[str]:
        units = sorted((token for token in self._spelling if len(token) > 1), key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, units), "."]), re.DOTALL)

    def _pieces(self, text: str) -> list[str]:
        """Characters and units, the longest unit first; one space between words."""
        between = "" if self.delimiter is None and " " not in self._spelling else " "
        return self._splitter.findall(between.join((text.upper() if self.do_lower_case else text).split()))


def count_characters(texts: Iterable[str], *, upper: bool = False) -> Counter[str]:
    """How often each character stands in `texts`, white space left out."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update("".join((text.upper() if upper else text).split()))
    return counts
