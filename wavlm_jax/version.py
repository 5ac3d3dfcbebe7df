"""The version of this package, in a module of its own so that data and training need not import the package's face."""

__version__ = "0.1.0"
