"""Packages that only some uses need (the extras of pyproject.toml): one message where one is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ValueError):
    """A package is not installed; the message names the extra that brings it."""


@contextmanager
def extra(name: str, use: str, otherwise: str = "") -> Iterator[None]:
    """For the imports of an extra, which stand in the block.

    Args:
        name: of the extra.
        use: what needs it, for the message.
        otherwise: what else can be done.

    Raises:
        MissingExtraError: in the place of ImportError.

    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{missing(name, use, str(error))}{otherwise}") from error


def missing(name: str, use: str, reason: str) -> str:
    """The message."""
    return f"{use} needs a package that is not here ({reason}): pip install 'wavlm-jax[{name}]'"
