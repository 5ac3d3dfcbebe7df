"""What a pickle may name, and what stands for the objects that it describes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something importable, and nothing but the name."""

    name: str


@dataclass(slots=True, eq=False)
class Inert:
    """An object of a class that is allowed to be mentioned: what the pickle says of it, as data."""

    kind: str
    """Full name of the class, "argparse.Namespace"."""
    arguments: tuple[Any, ...]
    state: Any = None
    """What would have become its attributes."""
    items: list[Any] = field(default_factory=list)
    """Elements, or (key, value) pairs, where the class is a container."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a pickle may name; everything else is refused."""

    calls: Mapping[str, Callable[..., Any]]
    """Full name -> our own function that stands for it."""
    names: frozenset[str]
    """Names that may stand as data."""
    inert: tuple[str, ...]
    """Classes ("argparse.Namespace") and packages ("omegaconf.") whose objects become `Inert`."""
    persistent: Callable[[Any], Any]
    """What the pickle's persistent ids stand for."""

    def knows(self, name: str) -> bool:
        """Whether a pickle may name this."""
        return all(map(str.isidentifier, name.split("."))) and (
            name in self.calls or name in self.names or self.is_inert(name)
        )

    def is_inert(self, name: str) -> bool:
        """Whether objects of this class become `Inert`."""
        return any(name == known or (known.endswith(".") and name.startswith(known)) for known in self.inert)
