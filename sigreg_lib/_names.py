"""What an error message says of a name that is not known: the nearest one, or all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LIKE = 0.6  # difflib's own cutoff: below it a "nearest" name has nothing to do with the one given
FEW = 12  # so many names are listed beside the nearest one


def suggest(name: object, known: Iterable[object], listed: Iterable[object] | None = None) -> str:
    """``"did you mean 'x'? known: x, y"``.

    Without the question where no name is like the given one, without the list where there are many
    names and one is like it. ``listed`` stands for all known names in the list.
    """
    names = [str(k) for k in known]
    shown = names if listed is None else [str(k) for k in listed]
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=LIKE)
    parts = [f"did you mean {near[0]!r}?"] if near else []
    if not near or len(shown) <= FEW:
        parts.append(f"known: {', '.join(shown)}")
    return " ".join(parts)
