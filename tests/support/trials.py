"""Lists of trials as VoxCeleb has them."""

from collections.abc import Iterable

from wavlm_jax.text.records import Trial


def trial_list(trials: Iterable[Trial]) -> str:
    """The text of a list: `1|0 path path`."""
    return "".join(f"{int(trial.same)} {trial.left} {trial.right}\n" for trial in trials)
