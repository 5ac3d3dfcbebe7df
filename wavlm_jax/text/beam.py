"""Word lists for decoding: a word a line, with or without its spelling; or the words of an ARPA language model.

Files come from outside: a line that cannot be right is named by its number.

Beam search with an n-gram language model (flashlight-text, extra `decode`), lexicon-free or with a lexicon.

score = log p(path) + lm_weight * log10 p_lm(text) + word_score * words + silence_score * delimiters.

Without a lexicon the language model is one of characters (tokens of the vocabulary, `|` between words); with a lexicon
it is one of words. Models are ARPA or KenLM binary files. KenLM reads them: take binary ones only from where you would
take a program.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Float32

from wavlm_jax.text.decoding import Span, Transcript, collapse, transcript
from wavlm_jax.text.records import RecordError, read_lines
from wavlm_jax.text.vocabulary import UnknownCharactersError, Vocabulary, VocabularyError

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


NEVER = -1e4
"""Log probability of what is not to be chosen; finite, because sums of it are taken."""


class DecoderError(ValueError):
    """A beam search that cannot be set up: a package, a language model or a lexicon that does not fit."""


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """How wide to search, and what counts how much (FACTS D2)."""

    beam: int = 100
    threshold: float = 100.0
    """Hypotheses that are worse than the best by more than this are dropped."""
    lm_weight: float = 2.0
    word_score: float = -1.0
    """For each word of a lexicon."""
    silence_score: float = 0.0
    sum_paths: bool = False
    """Whether the paths of a text add up; as in fairseq the best one counts alone."""
    num_best: int = 1
    lm_unknown: Literal["refuse", "allow"] = "refuse"
    """What to do where the language model does not know a token (or a word of the lexicon)."""

    def __post_init__(self) -> None:
        for name in ("beam", "num_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 1 or more")


class Hypothesis(NamedTuple):
    """One reading of an utterance."""

    transcript: Transcript
    score: float
    model_score: float
    """log p of the path."""
    lm_score: float
    """log10 p of the text, unweighted."""


class BeamSearch:
    """A decoder for one vocabulary, set up once; call it with the log probabilities of an utterance."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: BeamSettings = BeamSettings(),
        language_model: Path | None = None,
        lexicon: Lexicon | None = None,
    ) -> None:
        """Set up the search.

        Args:
            vocabulary: of the model.
            settings: of the search.
            language_model: ARPA or KenLM binary file; of words where there is a lexicon, of tokens otherwise.
            lexicon: the words that can be heard; None: anything that can be spelt.

        Raises:
            DecoderError: flashlight-text is not installed, or language model, lexicon and vocabulary do not fit.

        """
        if lexicon is not None and vocabulary.delimiter is None:
            raise DecoderError("lexicon: the vocabulary has no delimiter between words; decode without a lexicon")
        if language_model is not None and not language_model.is_file():
            raise DecoderError(f"{language_model}: no such file; expected a language model (ARPA or KenLM binary)")
        self._vocabulary, self._settings = vocabulary, settings
        self._words = None if lexicon is None else list(lexicon)
        self._bare = language_model is None and lexicon is None
        self._flashlight = _flashlight()
        self._parts = self._flashlight.decoder
        units = list(vocabulary.tokens) if self._words is None else self._words
        self._lm = self._language_model(language_model, units)
        self._decoder = self._lexicon_free() if lexicon is None else self._with_lexicon(lexicon)

    def __call__(self, log_probs: Float[np.ndarray, "frames tokens"]) -> list[Hypothesis]:
        """The best readings, the best one first; at least one.

        Args:
            log_probs: log-softmax of the logits, real frames only.

        Raises:
            VocabularyError: the model has another number of outputs than the vocabulary has tokens.

        """
        frames, tokens = log_probs.shape
        if tokens != len(self._vocabulary):
            raise VocabularyError(
                f"log_probs: found {tokens} tokens a frame, the vocabulary has {len(self._vocabulary)}; it belongs to "
                "another model"
            )
        emissions = self._emissions(log_probs)
        if not frames:
            return [Hypothesis(Transcript("", (), ()), 0.0, 0.0, 0.0)]
        results = self._decoder.decode(emissions.ctypes.data, *emissions.shape)
        best: dict[str, Hypothesis] = {}
        for result in sorted(results, key=lambda result: -result.score):
            heard = self._transcript(result, frames)
            best.setdefault(heard.text, Hypothesis(heard, result.score, result.emittingModelScore, result.lmScore))
        return list(best.values())[: self._settings.num_best]

    def _emissions(self, log_probs: Float[np.ndarray, "frames tokens"]) -> Float32[np.ndarray, "steps tokens"]:
        """What flashlight reads: where words have to end with a delimiter, one more frame has it after the last."""
        emissions = np.maximum(log_probs, NEVER).astype(np.float32)
        if not self._bare:
            special = sorted(self._vocabulary.special_ids - {self._vocabulary.blank_id})
            emissions[:, special] = NEVER
        if self._words is not None:
            end = np.full((1, emissions.shape[1]), NEVER, np.float32)
            end[0, self._vocabulary.delimiter_id] = 0.0
            emissions = np.concatenate([emissions, end])
        return np.ascontiguousarray(emissions)

    def _transcript(self, result: Any, frames: int) -> Transcript:
        path = np.array(result.tokens[1 : frames + 1])
        runs = [run for run in collapse(path) if run.token_id != self._vocabulary.blank_id]
        heard = transcript(runs, self._vocabulary)
        if self._words is None:
            return heard
        names = [self._words[number] for number in result.words if number >= 0]
        words = tuple(Span(name, word.start, word.end) for name, word in zip(names, heard.words, strict=True))
        return Transcript(" ".join(names), heard.characters, words)

    def _lexicon_free(self) -> Any:
        settings = self._settings
        options = self._parts.LexiconFreeDecoderOptions(
            beam_size=settings.beam,
            beam_size_token=len(self._vocabulary),
            beam_threshold=settings.threshold,
            lm_weight=settings.lm_weight,
            sil_score=settings.silence_score,
            log_add=settings.sum_paths,
            criterion_type=self._parts.CriterionType.CTC,
        )
        return self._parts.LexiconFreeDecoder(options, self._lm, self._silence, self._vocabulary.blank_id, [])

    def _with_lexicon(self, lexicon: Lexicon) -> Any:
        parts, settings = self._parts, self._settings
        trie = parts.Trie(len(self._vocabulary), self._silence)
        start = self._lm.start(False)
        for number, spellings in enumerate(lexicon.values()):
            _, score = self._lm.score(start, number)
            for spelling in spellings:
                trie.insert([*spelling, self._silence], number, score)
        trie.smear(parts.SmearingMode.MAX)
        options = parts.LexiconDecoderOptions(
            beam_size=settings.beam,
            beam_size_token=len(self._vocabulary),
            beam_threshold=settings.threshold,
            lm_weight=settings.lm_weight,
            word_score=settings.word_score,
            unk_score=-np.inf,
            sil_score=settings.silence_score,
            log_add=settings.sum_paths,
            criterion_type=parts.CriterionType.CTC,
        )
        unknown = len(lexicon)
        return parts.LexiconDecoder(
            options, trie, self._lm, self._silence, self._vocabulary.blank_id, unknown, [], False
        )

    @property
    def _silence(self) -> int:
        delimiter = self._vocabulary.delimiter_id
        return -1 if delimiter is None else delimiter

    def _language_model(self, path: Path | None, units: Sequence[str]) -> Any:
        if path is None:
            return self._parts.ZeroLM()
        names = [*units, _NO_WORD]
        try:
            dictionary = self._flashlight.dictionary.Dictionary(names)
            model = self._flashlight.kenlm.KenLM(str(path), dictionary)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1]
            raise DecoderError(f"{path}: not a language model that KenLM reads ({reason})") from error
        self._check_known(path, model, units)
        return model

    def _check_known(self, path: Path, model: Any, units: Sequence[str]) -> None:
        special = self._vocabulary.special_ids if self._words is None else frozenset()
        missing = [units[number] for number in _unknown_units(path, model, units) if number not in special]
        if missing and self._settings.lm_unknown == "refuse":
            what = "tokens of the vocabulary" if self._words is None else "words of the lexicon"
            listed = ", ".join(map(repr, missing[:_LISTED])) + (", ..." if len(missing) > _LISTED else "")
            raise DecoderError(
                f"{path}: does not know {len(missing)} of {len(units) - len(special)} {what} ({listed}); is it a model "
                "of the same case and of the right units (characters without a lexicon, words with one)? "
                "lm_unknown='allow' (--lm-unknown allow) goes on"
            )


_NO_WORD = "\x00 nobody says this"
_LISTED = 8
_ARPA_HEAD = 64


def _unknown_units(path: Path, model: Any, units: Sequence[str]) -> list[int]:
    """The units, by number, that a language model does not know; `model` knows `units` and, behind them, `_NO_WORD`.

    An ARPA file lists its words. KenLM's binary files are asked: it gives an unknown word what it gives `_NO_WORD`.
    """
    with path.open("rb") as file:
        is_arpa = file.read(_ARPA_HEAD).lstrip().startswith(b"\\data\\")
    if is_arpa:
        known = set(words_of_arpa(path))
        return [number for number, unit in enumerate(units) if unit not in known]
    start = model.start(False)
    _, unknown_score = model.score(start, len(units))
    return [number for number in range(len(units)) if model.score(start, number)[1] == unknown_score]


class _Flashlight(NamedTuple):
    """The modules of flashlight-text."""

    decoder: Any
    dictionary: Any
    kenlm: Any


def _flashlight() -> _Flashlight:
    try:
        import flashlight.lib.text.decoder.kenlm as kenlm  # noqa: PLC0415, PLR0402 an extra
        import flashlight.lib.text.dictionary as dictionary  # noqa: PLC0415, PLR0402
        from flashlight.lib.text import decoder  # noqa: PLC0415
    except ImportError as error:
        raise DecoderError(f"beam search needs flashlight-text, which is not installed: {_cure()}") from error
    return _Flashlight(decoder, dictionary, kenlm)


def _cure() -> str:
    if sys.version_info < _NO_WHEEL:
        return "pip install 'wavlm-jax[decode]'"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"there is no wheel for Python {version}. Decode greedily (neither --lm, --lexicon nor --beam), take Python "
        "3.11 or 3.12 with 'wavlm-jax[decode]', or build flashlight-text from source"
    )


_NO_WHEEL = (3, 13)
