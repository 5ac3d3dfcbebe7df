"""The sections of a config that belong to the training tower, in one dataclass."""

from dataclasses import dataclass

from wavlm_jax.training.mesh import MeshSettings
from wavlm_jax.training.optim import OptimSettings
from wavlm_jax.training.retention import CheckpointSettings
from wavlm_jax.training.writers import MetricsSettings


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long, and what happens on the way."""

    num_steps: int
    eval_every: int
    """Steps; the last step always has an evaluation."""
    eval_splits: tuple[str, ...]
    max_nonfinite_in_a_row: int
    """So many steps in a row that change nothing stop the run."""
    compilation_cache: str | None
    """Folder of compiled programs, relative to the workdir; None: compiled anew at every start."""
    max_step_seconds: float
    """A step, a wait for data or an evaluation batch that takes longer ends the process (`watchdog`)."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "eval_every", "max_nonfinite_in_a_row", "max_step_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The sections of the config that belong to the training tower; `settings.read_sections` fills it."""

    seed: int
    train: LoopSettings
    optim: OptimSettings
    checkpoint: CheckpointSettings
    mesh: MeshSettings
    metrics: MetricsSettings
