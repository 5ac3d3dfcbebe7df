"""Word lists for decoding: a word a line, with or without its spelling; or the words of an ARPA language model.

Files come from outside: a line that cannot be right is named by its number.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from wavlm_jax.text.lines import RecordError, read_lines
from wavlm_jax.text.vocabulary import UnknownCharactersError, Vocabulary

Lexicon: TypeAlias = Mapping[str, Sequence[tuple[int, ...]]]
"""Word -> its spellings in token ids, the delimiter at their ends left out."""

_MARKERS = ("<unk>", "<s>", "</s>", "<UNK>")


class LexiconError(RecordError):
    """A word list that cannot be used; the message names file and line."""


def read_lexicon(path: Path, vocabulary: Vocabulary) -> Lexicon:
    """The words of a text file, UTF-8: `WORD`, spelt by the vocabulary, or `WORD T O K E N S |` as flashlight has it.

    Raises:
        RecordError: no such file, no words, or a line with tokens or characters that the vocabulary does not have.

    """
    lexicon: dict[str, list[tuple[int, ...]]] = {}
    for number, line in read_lines(path):
        fields = line.split()
        if not fields:
            continue
        spelling = _spelling(fields[0], fields[1:], vocabulary, f"{path}, line {number}")
        spellings = lexicon.setdefault(fields[0], [])
        if spelling not in spellings:
            spellings.append(spelling)
    if not lexicon:
        raise LexiconError(f"{path}: found no word, expected one a line")
    return lexicon


def lexicon_of_words(words: Iterable[str], vocabulary: Vocabulary) -> Lexicon:
    """Words spelt by the vocabulary; those that it cannot spell are left out.

    Raises:
        LexiconError: it can spell none of them.

    """
    words = list(words)
    lexicon = {
        word: (tuple(vocabulary.encode(word).tolist()),)
        for word in words
        if word and not vocabulary.unknown_characters(word)
    }
    if not lexicon:
        raise LexiconError(
            f"lexicon: the vocabulary can spell none of {len(words)} words ({', '.join(map(repr, words[:5]))}); is the "
            "case another one?"
        )
    return lexicon


def words_of_arpa(path: Path) -> list[str]:
    """The words that an ARPA language model knows (its unigrams, without `<s>`, `</s>` and `<unk>`).

    Raises:
        LexiconError: not an ARPA file, naming the line.

    """
    words: list[str] = []
    inside = False
    for number, line in read_lines(path):
        text = line.strip()
        if text == "\\1-grams:":
            inside = True
        elif inside and text.startswith("\\"):
            return words
        elif inside and text:
            fields = text.split()
            if len(fields) not in (2, 3):
                raise LexiconError(
                    f"{path}, line {number}: found {text[:60]!r}, expected log10 probability, word, backoff"
                )
            words.extend([] if fields[1] in _MARKERS else [fields[1]])
        elif number == 1 and text and text != "\\data\\":
            raise LexiconError(f"{path}, line 1: found {text[:60]!r}, expected \\data\\ as ARPA files have it")
    raise LexiconError(f"{path}: found no end of the 1-grams; is it an ARPA file, and whole?")


def _spelling(word: str, tokens: Sequence[str], vocabulary: Vocabulary, where: str) -> tuple[int, ...]:
    if not tokens:
        try:
            return tuple(vocabulary.encode(word).tolist())
        except UnknownCharactersError as error:
            raise LexiconError(f"{where}: {error}") from error
    if vocabulary.delimiter is not None and tokens[-1] == vocabulary.delimiter:
        tokens = tokens[:-1]
    unknown = [token for token in tokens if token not in vocabulary.tokens]
    if unknown or not tokens:
        raise LexiconError(
            f"{where}: {word!r} is spelt with {unknown or 'nothing'}, which the vocabulary does not have"
        )
    return tuple(vocabulary.tokens.index(token) for token in tokens)
