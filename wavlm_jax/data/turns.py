"""Who speaks when in the recordings of a corpus: `turns.rttm` beside its header, recordings named by utterance ids.

A recording that has turns counts as annotated from its first to its last sample.
"""

from collections.abc import Mapping, Sequence

from wavlm_jax.data.corpora import Corpus
from wavlm_jax.data.sources import SourceError
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.text.rttm import Turn, read_rttm, write_rttm
from wavlm_jax.whole_file import write_text

TURNS = "turns.rttm"


def attach_turns(corpus: Corpus, turns: Sequence[Turn]) -> int:
    """Put the turns of the corpus' recordings into its folder, whole or not at all; turns of others are left out.

    Returns:
        How many recordings have turns.

    Raises:
        SourceError: a turn that begins behind the end of its recording, or no recording that has any.

    """
    lengths = {str(name): int(samples) for name, samples in zip(corpus.ids, corpus.lengths, strict=True)}
    held = [turn for turn in turns if turn.recording in lengths]
    if not held:
        found = ", ".join(sorted({turn.recording for turn in turns})[:3]) or "none"
        raise SourceError(
            f"{corpus.path}: no turn is of one of its recordings; the turns are of {found}, the recordings are called "
            f"{', '.join(list(lengths)[:3])}; the second column of an RTTM file is an utterance id"
        )
    for turn in held:
        if turn.start * SAMPLE_RATE >= lengths[turn.recording]:
            raise SourceError(
                f"{corpus.path}: a turn of {turn.recording} begins at {turn.start:.3f} s, the recording lasts "
                f"{lengths[turn.recording] / SAMPLE_RATE:.3f} s; are the turns of another recording?"
            )
    write_text(corpus.path / TURNS, write_rttm(held))
    return len({turn.recording for turn in held})


def turns_of(corpus: Corpus) -> Mapping[str, Sequence[Turn]]:
    """The turns of each recording that has any, by utterance id.

    Raises:
        FileNotFoundError: the corpus has no `turns.rttm`.
        RecordError: a line of it that cannot be right, by its number.

    """
    file = corpus.path / TURNS
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; a corpus gets its turns when it is prepared: python -m wavlm_jax.data SOURCE --out "
            f"{corpus.path} --rttm FILE ... (again, where it is there already)"
        )
    found: dict[str, list[Turn]] = {}
    for turn in read_rttm(file):
        found.setdefault(turn.recording, []).append(turn)
    return found
