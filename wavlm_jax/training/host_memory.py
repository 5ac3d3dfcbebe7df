"""How much memory of the host this process holds, before, during and after a save."""

import resource
import sys
from pathlib import Path

_STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes that are in memory now; where the system does not say (macOS), the most that ever were."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Resident:
    """Bytes in memory since it was made, at moments that have names."""

    def __init__(self) -> None:
        self.moments = {"before": resident()}

    def note(self, moment: str) -> None:
        """What is in memory now, under this name."""
        self.moments[moment] = resident()

    def describe(self) -> str:
        """For the log."""
        parts = ", ".join(f"{moment} {value / 2**20:,.0f}" for moment, value in self.moments.items())
        return f"host memory in MiB: {parts}"
