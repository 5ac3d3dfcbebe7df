"""Beam search over CTC outputs with an n-gram language model, with or without a lexicon (flashlight-text).

score = log p(path) + lm_weight * log10 p_lm(text) + word_score * words + silence_score * delimiters (FACTS D2).

Without a lexicon the language model is one of characters (tokens of the vocabulary, `|` between words); with a lexicon
it is one of words. Models are ARPA or KenLM binary files, read by KenLM: use binary files only from sources whose
programs you would run. Lexicons are text files from outside; a wrong line is named by its number. flashlight-text is
the extra `decode`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Float32

from wavlm_jax.extras import extra
from wavlm_jax.text.decoding import Span, Transcript, collapse, transcript
from wavlm_jax.text.records import RecordError, read_lines
from wavlm_jax.text.vocabulary import UnknownCharactersError, Vocabulary, VocabularyError

Lexicon: TypeAlias = Mapping[str, Sequence[tuple[int, ...]]]
"""Word -> its spellings in token ids, without the delimiter at the end."""

_MARKERS = ("<unk>", "<s>", "</s>", "<UNK>")


def read_lexicon(path: Path, vocabulary: Vocabulary) -> Lexicon:
    """A lexicon from a UTF-8 text file, one word per line: `WORD`, or `WORD T O K E N S |` (flashlight's form).

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
        raise RecordError(f"{path}: found no word, expected one per line")
    return lexicon


def words_of_arpa(path: Path) -> list[str]:
    """The words that an ARPA language model, gzipped or not, knows (unigrams without `<s>`, `</s>` and `<unk>`).

    Raises:
        RecordError: not an ARPA file, naming the line.

    """
    words: list[str] = []
    inside = False
    for number, line in read_lines(path, unpack=True):
        text = line.strip()
        if text == "\\1-grams:":
            inside = True
        elif inside and text.startswith("\\"):
            return words
        elif inside and text:
            fields = text.split()
            if len(fields) not in (2, 3):
                raise RecordError(
                    f"{path}, line {number}: found {text[:60]!r}, expected log10 probability, word, backoff"
                )
            words.extend([] if fields[1] in _MARKERS else [fields[1]])
        elif number == 1 and text and text[0] != "#" and text != "\\data\\":
            raise RecordError(f"{path}, line 1: found {text[:60]!r}, expected \\data\\ as ARPA files have it")
    raise RecordError(f"{path}: found no end of the 1-grams; is it an ARPA file, and whole?")


def _spelling(word: str, tokens: Sequence[str], vocabulary: Vocabulary, where: str) -> tuple[int, ...]:
    if not tokens:
        try:
            return tuple(vocabulary.encode(word).tolist())
        except UnknownCharactersError as error:
            raise RecordError(f"{where}: {error}") from error
    if vocabulary.delimiter is not None and tokens[-1] == vocabulary.delimiter:
        tokens = tokens[:-1]
    unknown = [token for token in tokens if token not in vocabulary.tokens]
    if unknown or not tokens:
        raise RecordError(f"{where}: {word!r} is spelt with {unknown or 'nothing'}, which the vocabulary does not have")
    return tuple(vocabulary.tokens.index(token) for token in tokens)


NEVER = -1e4
"""Log probability of tokens that must not be chosen; finite, because flashlight adds it up."""


class DecoderError(ValueError):
    """A beam search that cannot be set up: language model or lexicon do not fit."""


_WIDEST = 2**20
"""Hypotheses that are kept; the decoder counts them with 32 bits."""


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """Width of the search and weights of the score (FACTS D2)."""

    beam: int = 100
    threshold: float = 100.0
    """Hypotheses whose score is lower than the best one's by more than this are dropped."""
    lm_weight: float = 2.0
    word_score: float = -1.0
    """Added for each word of a lexicon."""
    silence_score: float = 0.0
    """Added for each delimiter."""
    sum_paths: bool = False
    """Whether the probabilities of all paths of a text are added; False (as in fairseq): only the best path counts."""
    num_best: int = 1
    lm_unknown: Literal["refuse", "allow"] = "refuse"
    """What to do if the language model does not know a token (or a word of the lexicon)."""

    def __post_init__(self) -> None:
        for name in ("beam", "num_best"):
            if not 1 <= getattr(self, name) <= _WIDEST:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 1 to {_WIDEST:,}")


class Hypothesis(NamedTuple):
    """One possible transcript of an utterance."""

    transcript: Transcript
    score: float
    model_score: float
    """log p of the path."""
    lm_score: float
    """log10 p of the text, unweighted."""


class BeamSearch:
    """A decoder for one vocabulary; call it with the log probabilities of an utterance."""

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
            lexicon: the only words that can come out; None: anything that the vocabulary can spell.

        Raises:
            DecoderError: language model, lexicon and vocabulary do not fit.
            MissingExtraError: flashlight-text is not installed.

        """
        if lexicon is not None and vocabulary.delimiter is None:
            raise DecoderError("lexicon: the vocabulary has no delimiter between words; decode without a lexicon")
        if language_model is not None and not language_model.is_file():
            raise DecoderError(f"{language_model}: no such file; expected a language model (ARPA or KenLM binary)")
        if lexicon is not None:  # its words go from delimiter to delimiter, of phones too
            vocabulary = replace(vocabulary, phones=False)
        self._vocabulary, self._settings = vocabulary, settings
        self._words = None if lexicon is None else list(lexicon)
        self._bare = language_model is None and lexicon is None
        self._parts, dictionary, kenlm = _flashlight()
        units = list(vocabulary.tokens) if self._words is None else self._words
        if language_model is None:
            self._lm = self._parts.ZeroLM()
        else:
            special = vocabulary.special_ids if self._words is None else frozenset()
            self._lm, missing = _fitting_language_model(language_model, units, special, dictionary, kenlm)
            self._check_known(language_model, [units[number] for number in missing], len(units) - len(special))
        self._decoder = self._lexicon_free() if lexicon is None else self._with_lexicon(lexicon)

    def __call__(self, log_probs: Float[np.ndarray, "frames tokens"]) -> list[Hypothesis]:
        """The best hypotheses, best first; at least one.

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
        """Input for flashlight. With a lexicon each word has to end with a delimiter: one more frame has it."""
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
        path = self._vocabulary.known(result.tokens[1 : frames + 1])
        runs = [run for run in collapse(path) if run.token_id not in self._vocabulary.hidden_ids]
        heard = transcript(runs, self._vocabulary)
        if self._words is None:
            return heard
        names = [self._words[number] for number in result.words if number >= 0]
        words = tuple(Span(name, word.start, word.end) for name, word in zip(names, heard.words, strict=True))
        return Transcript(" ".join(names), heard.characters, words)

    def _options(self) -> dict[str, Any]:
        """Options of both of flashlight's decoders."""
        settings = self._settings
        return {
            "beam_size": settings.beam,
            "beam_size_token": len(self._vocabulary),
            "beam_threshold": settings.threshold,
            "lm_weight": settings.lm_weight,
            "sil_score": settings.silence_score,
            "log_add": settings.sum_paths,
            "criterion_type": self._parts.CriterionType.CTC,
        }

    def _lexicon_free(self) -> Any:
        options = self._parts.LexiconFreeDecoderOptions(**self._options())
        return self._parts.LexiconFreeDecoder(options, self._lm, self._silence, self._vocabulary.blank_id, [])

    def _with_lexicon(self, lexicon: Lexicon) -> Any:
        parts = self._parts
        trie = parts.Trie(len(self._vocabulary), self._silence)
        start = self._lm.start(False)
        for number, spellings in enumerate(lexicon.values()):
            _, score = self._lm.score(start, number)
            for spelling in spellings:
                trie.insert([*spelling, self._silence], number, score)
        trie.smear(parts.SmearingMode.MAX)
        options = parts.LexiconDecoderOptions(
            **self._options(), word_score=self._settings.word_score, unk_score=-np.inf
        )
        unknown = len(lexicon)
        return parts.LexiconDecoder(
            options, trie, self._lm, self._silence, self._vocabulary.blank_id, unknown, [], False
        )

    @property
    def _silence(self) -> int:
        delimiter = self._vocabulary.delimiter_id
        return -1 if delimiter is None else delimiter

    def _check_known(self, path: Path, missing: Sequence[str], num_units: int) -> None:
        if missing and self._settings.lm_unknown == "refuse":
            what = "tokens of the vocabulary" if self._words is None else "words of the lexicon"
            listed = ", ".join(map(repr, missing[:_LISTED])) + (", ..." if len(missing) > _LISTED else "")
            raise DecoderError(
                f"{path}: does not know {len(missing)} of {num_units} {what} ({listed}), tried in lower and "
                "upper case too; is it a model of the right units (characters without a lexicon, words with one)? "
                "lm_unknown='allow' (--lm-unknown allow) goes on"
            )


_NO_WORD = "\x00 nobody says this"
"""A word that no language model knows."""
_LISTED = 8
_BINARY_HEAD = b"mmap lm http://kheafield.com/code"
_NO_WHEEL = (3, 13)
"""Python versions from this one on have no wheel of flashlight-text."""


def _fitting_language_model(
    path: Path, units: Sequence[str], special: frozenset[int], dictionary: Any, kenlm: Any
) -> tuple[Any, list[int]]:
    """KenLM's model, and the numbers of the units, other than `special`, that it does not know.

    Where it does not know most of them it is tried in lower and in upper case, as models often come in another case
    than a vocabulary; units that would become one are not.
    """
    found: list[tuple[Any, list[int]]] = []
    for case in (str, str.lower, str.upper):
        spelt = [case(unit) for unit in units]
        if len({*spelt}) < len(spelt):
            continue
        model = _read_language_model(path, spelt, dictionary, kenlm)
        found.append((model, [n for n in _unknown_units(path, model, spelt) if n not in special]))
        if len(found[-1][1]) <= (len(units) - len(special)) // 2:
            break
    return min(found, key=lambda one: len(one[1]))


def _read_language_model(path: Path, units: Sequence[str], dictionary: Any, kenlm: Any) -> Any:
    """KenLM's model over `units`, by number, and `_NO_WORD` after them."""
    try:
        return kenlm.KenLM(str(path), dictionary.Dictionary([*units, _NO_WORD]))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1]
        raise DecoderError(f"{path}: not a language model that KenLM reads ({reason})") from error


def _unknown_units(path: Path, model: Any, units: Sequence[str]) -> list[int]:
    """Numbers of the units that a language model (of `_read_language_model`) does not know.

    An ARPA file lists its words. Of a binary file, a word is unknown if it has the score of `_NO_WORD`.
    """
    with path.open("rb") as file:
        is_binary = file.read(len(_BINARY_HEAD)) == _BINARY_HEAD
    if not is_binary:
        known = set(words_of_arpa(path))
        return [number for number, unit in enumerate(units) if unit not in known]
    start = model.start(False)
    _, unknown_score = model.score(start, len(units))
    return [number for number in range(len(units)) if model.score(start, number)[1] == unknown_score]


def _flashlight() -> tuple[Any, Any, Any]:
    """The modules `decoder`, `dictionary` and `kenlm` of flashlight-text."""
    otherwise = ""
    if sys.version_info >= _NO_WHEEL:
        otherwise = (
            f" under Python 3.11 or 3.12. flashlight-text has no wheel for Python {sys.version_info.major}."
            f"{sys.version_info.minor}: decode greedily (neither --lm, --lexicon nor --beam) or build it from source"
        )
    with extra("decode", "beam search", otherwise):
        import flashlight.lib.text.decoder.kenlm as kenlm  # noqa: PLC0415, PLR0402
        import flashlight.lib.text.dictionary as dictionary  # noqa: PLC0415, PLR0402
        from flashlight.lib.text import decoder  # noqa: PLC0415
    return decoder, dictionary, kenlm
