"""Which checkpoints there are to be."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When a checkpoint is written, and which are kept."""

    every: int
    """Steps from one to the next; the last step always has one."""
    keep_last: int
    """The newest n stay."""
    keep_every: int | None
    """Those at multiples of this many steps stay for ever; None: none."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1 or (self.keep_every is not None and self.keep_every < 1):
            raise ValueError(
                f"every {self.every}, keep_last {self.keep_last}, keep_every {self.keep_every}: expected 1 or more"
            )

    def superfluous(self, steps: Sequence[int]) -> list[int]:
        """Those of `steps`, oldest first, that are not kept."""
        older = steps[: -self.keep_last]
        return [step for step in older if self.keep_every is None or step % self.keep_every]
