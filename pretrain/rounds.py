"""All hosts make features side by side: the same program at the same time on the devices of all, each its own rows.

A host that has fewer batches than others, or that has failed, goes on with filler, so that nobody waits on a device for
a program that never comes; what failed is told at the next meeting (`shares.together`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array

from pretrain.batches import Piece
from pretrain.features import Corpus, FeatureSource, Utterances
from pretrain.row_shards import put_rows, row_sharding, rows_over
from pretrain.shares import most, together

Result = TypeVar("Result")
Part = tuple[int, int]
"""The first of consecutive items, and the one behind the last."""
Program = Callable[[Any], Array]
"""From the arrays of a batch of all hosts to an array of which each has its rows."""
Use = Callable[[Array, tuple[Piece, ...]], None]
_Done = tuple[Array, tuple[Piece, ...]]


def in_parts(name: str, parts: Sequence[Part], do: Callable[[int, int], None]) -> None:
    """Does one part after the other; hosts that have none left do (0, 0) until all have done theirs.

    Args:
        name: of the stage, for messages.
        parts: of this host.
        do: one of them, the same programs on all hosts. May fail on some hosts only.

    Raises:
        LabelError, HostsMissing: as `together`.

    """
    rounds = most(f"parts of {name}", {0: len(parts)})[0]
    for first, end in [*parts, *[(0, 0)] * (rounds - len(parts))]:
        together(name, partial(do, first, end))


def in_rounds(
    name: str, source: FeatureSource, corpus: Corpus, utterances: Utterances, program: Program, use: Use
) -> None:
    """Gives the batches of some utterances to the devices, while other hosts give those of theirs.

    Args:
        name: of the stage, for messages.
        source: of the batches.
        corpus: of the utterances.
        utterances: of this host.
        program: what to compute.
        use: gets what comes of each batch of this host, one batch late so that the devices never wait for the host.

    Raises:
        ValueError, OSError: of `source` or `use`, after the rounds of the other hosts.

    """
    ours = source.sizes(np.asarray(corpus.lengths)[utterances])
    everyones = most(f"batches of {name}", ours)
    trial, sharding, batches = _Trial(), row_sharding(), source.batches(corpus, utterances)
    mesh: Any = sharding.mesh
    done: _Done | None = None
    for size, rounds in sorted(everyones.items()):
        for number in range(rounds):
            batch = trial.of(lambda: next(batches, None)) if number < ours[size] else None
            # None too where the audio is shorter than the corpus says, or something failed.
            arrays, pieces = source.empty(size)[1:] if batch is None else batch[1:]
            with rows_over(mesh):
                result = program(put_rows(arrays, sharding))
            trial.of(partial(_use, use, done))
            done = result, pieces
    trial.of(partial(_use, use, done))
    trial.end()


def _use(use: Use, done: _Done | None) -> None:
    if done is not None and done[1]:
        use(*done)


class _Trial:
    """What may fail on this host while others go on: after the first failure nothing more is tried."""

    def __init__(self) -> None:
        self._error: Exception | None = None

    def of(self, do: Callable[[], Result]) -> Result | None:
        """What `do` gives; None where it or something before it failed. Alone nobody waits: what it raises."""
        if self._error is not None:
            return None
        try:
            return do()
        except (ValueError, OSError) as error:
            if jax.process_count() == 1:
                raise
            self._error = error
            return None

    def end(self) -> None:
        """Raises what failed."""
        if self._error is not None:
            raise self._error
