"""What can be wrong with a file from outside. Both kinds name the file and the reason."""


class DamagedFile(ValueError):  # noqa: N818 (named for the file that it is about)
    """A file that is cut off, altered, or not of the kind that it was taken for."""


class HostileFile(ValueError):  # noqa: N818 (as above)
    """A file that asks for code to be run, or for more memory than it can fill."""
