"""The version of fimlib."""

__version__ = "0.2.0"
