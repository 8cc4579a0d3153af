"""What the arguments of the network must be: errors that say what came."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_integers(least: int, **values: Any) -> None:
    """Raise unless all are integers, and not smaller than that.

    Raises:
        TypeError: If one is no integer; a bool is none.
        ValueError: If one is too small.
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(
                f'{name} must be an integer, got {value!r} ({type(value).__name__})'
            )
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')


def check_sequence(least: int, **values: Any) -> None:
    """Raise unless all are sequences, such as lists and tuples, of such integers.

    Raises:
        TypeError: If one is no sequence, or an entry no integer.
        ValueError: If an entry is too small.
    """
    for name, value in values.items():
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(
                f'{name} must be a sequence of integers, got {value!r}'
                f' ({type(value).__name__}); for one value write ({value!r},)'
            )
        for i, entry in enumerate(value):
            check_integers(least, **{f'{name}[{i}]': entry})


def check_rate(**values: Any) -> None:
    """Raise unless all are numbers from 0 up to, but not, 1.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is out of range.
    """
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(
                f'{name} must be a number, got {value!r} ({type(value).__name__})'
            )
        if not 0 <= float(value) < 1:
            raise ValueError(f'{name} must be from 0 to below 1, got {value}')
