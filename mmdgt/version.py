"""The version of mmdgt."""

__version__ = '0.1.0'
