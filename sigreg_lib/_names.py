"""The known name nearest to one that was mistyped, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[object], cutoff: float = 0.0) -> str | None:
    """The known name most similar to ``name``; None if none reaches ``cutoff`` (0 to 1)."""
    names = [str(k) for k in known]
    return next(iter(difflib.get_close_matches(str(name), names, n=1, cutoff=cutoff)), None)
