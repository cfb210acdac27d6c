"""Whether a value is an integer, or what its type hint says."""

from __future__ import annotations

import numbers
import typing
from typing import Any, Literal

from sigreg_lib._names import suggest


def is_integer(value: Any) -> bool:
    """Whether it is an integer of any kind, as NumPy's are; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint itself."""
    return (hint,) if typing.get_origin(hint) in (Literal, None, tuple) else typing.get_args(hint)


def _fits(value: Any, hint: Any) -> bool:
    if hint is type(None):
        return value is None
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        inner = [a for a in typing.get_args(hint) if a is not Ellipsis]
        fixed = Ellipsis not in typing.get_args(hint)
        return (
            isinstance(value, tuple)
            and all(_fits(v, inner[0]) for v in value)
            and (not fixed or len(value) == len(inner))
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def check_type(name: str, value: Any, hint: Any) -> None:
    """ValueError, with what would be right, where a setting's value is not of its hint's kind."""
    options = alternatives(hint)
    if any(_fits(value, option) for option in options):
        return
    words = [w for option in options for w in typing.get_args(option) if isinstance(w, str)]
    others = [option for option in options if typing.get_origin(option) is not Literal]
    if words and isinstance(value, str) and not others:
        raise ValueError(f"unknown {name} {value!r}; {suggest(value, words)}")
    kinds = [getattr(o, "__name__", str(o)).replace("NoneType", "none") for o in others]
    raise ValueError(f"{name} must be {' or '.join([*kinds, *words])}, not {value!r}")
