"""Options of `python -m wavlm_jax.data simulate`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wavlm_jax.data.conversations import ConversationSettings
from wavlm_jax.data.prepare import Result
from wavlm_jax.data.simulate import Room, open_mixer, open_room, overlap_share, simulate

_DESCRIPTION = """Mixes conversations from a corpus of utterances of one speaker each, for training of diarisation: a
corpus of its own, with turns.rttm. The turns are where the mixed voices are loud, exact to 10 ms."""


def run(words: Sequence[str], workers: int) -> tuple[Result, Path]:
    """Make the corpus; what it is and where.

    Raises:
        SystemExit: options that cannot be right.
        SourceError: a corpus without speakers, or with too few.

    """
    defaults, room = ConversationSettings(), Room()
    parser = argparse.ArgumentParser(prog="python -m wavlm_jax.data simulate", description=_DESCRIPTION)
    add = parser.add_argument
    add("corpus", type=Path, metavar="CORPUS", help="utterances with speakers, prepared")
    add("--out", type=Path, required=True, metavar="CORPUS", help="the conversations; made, resumed, or left alone")
    add("--conversations", type=int, default=100, help="default: 100")
    add("--speakers", type=int, nargs="+", default=list(defaults.speakers), help="how many, drawn (default: 2 3 4)")
    add("--seconds", type=float, default=defaults.seconds, help="about, of each (default: 60)")
    add("--pause-seconds", type=float, default=defaults.pause_seconds, help="mean pause (default: 1)")
    add("--overlap", type=float, default=defaults.overlap, help="share of two voices in speech (default: 0.15)")
    add("--independent", action="store_true", help="speakers on time lines of their own, as in EEND; no --overlap")
    add("--level-db", type=float, default=defaults.level_db, help="speakers differ by up to +- (default: 5)")
    add("--noise", type=Path, metavar="CORPUS", help="noise to put under the speech")
    add("--snr-db", type=float, nargs=2, default=list(room.snr_db), help="speech against noise (default: 10 25)")
    add("--rirs", type=Path, metavar="CORPUS", help="room impulse responses, one a speaker and conversation")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=workers, help="processes (default: one a core)")
    options = parser.parse_args(words)
    if options.conversations < 1:
        parser.error(f"--conversations: found {options.conversations}, expected 1 or more")
    try:
        settings = ConversationSettings(
            speakers=tuple(options.speakers),
            seconds=options.seconds,
            pause_seconds=options.pause_seconds,
            overlap=None if options.independent else options.overlap,
            level_db=options.level_db,
        )
        room = open_room(options.noise, tuple(options.snr_db), options.rirs)
    except ValueError as error:
        parser.error(str(error))
    mixer = open_mixer(options.corpus, settings, room, options.seed, options.workers)
    show = sys.stderr.isatty()
    result, turns = simulate(mixer, options.conversations, options.out, options.workers, progress=show)
    print(f"{len(turns)} turns; of the time in which anybody speaks, {overlap_share(turns):.1%} has several voices")
    return result, options.out
