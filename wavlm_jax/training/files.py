"""Files below one place: what checkpoints ask of a folder (`disk`) and of a bucket (`bucket`) alike."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Files(Protocol):
    """Files below `place`, each named by its path from there ("params/d/0"). What goes wrong is an OSError."""

    place: str
    """As people and Orbax know it."""
    readers: int
    """How many files are worth reading at a time."""

    def below(self, name: str) -> "Files":
        """The files of a folder in here."""
        ...

    def entries(self) -> list[str]:
        """Names of the files and folders directly in here; none where there is no such place."""
        ...

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file, however deep."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such a file now, whoever wrote it."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file; FileNotFoundError where there is none."""
        ...

    def digest(self, name: str, size: int) -> str:
        """SHA-256 of a file of `size` bytes, in hexadecimal."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """A whole file, durable when this returns."""
        ...

    def delete(self, name: str) -> None:
        """One file, if it is there."""
        ...

    def clear(self) -> None:
        """Everything."""
        ...

    def settle(self) -> None:
        """What others have written here is durable when this returns."""
        ...

    def check_room(self, num_bytes: int) -> None:
        """Really writes and removes something; the message of the OSError names the place and what to do."""
        ...
