"""Tables and figures from run records: one style, saved with their provenance.

`save_figure` and `save_table` write the caption, the records and the commit into the files and into
the index `README.md` beside them, `save_animation` into the index alone. The same code and records
give the same bytes: a figure changes in the history only when its content does. Plotting and table
libraries are imported where used.
"""

from __future__ import annotations

import io
import json
import math
import posixpath
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sigreg_lib._names import suggest
from sigreg_lib.records import write_atomically

if TYPE_CHECKING:
    from matplotlib.animation import Animation
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

BUDGETS = ("recorded", "smoke", "cpu", "full")
COLUMN, WIDE = 3.3, 6.8  # inches: one column of a two-column paper, and both

MOST_NAMES = 12  # records of one folder that an index entry names one by one

# Line style and marker tell the methods apart in greyscale; colours are seaborn's `colorblind`.
METHODS: dict[str, dict[str, Any]] = {
    "none": {"color": "#949494", "linestyle": ":", "marker": "s"},
    "strong": {"color": "#0173b2", "linestyle": "--", "marker": "^"},
    "weak": {"color": "#de8f05", "linestyle": "-", "marker": "o"},
    "published": {"color": "black", "linestyle": "", "marker": "D", "markerfacecolor": "none"},
}

_LATEX = {c: rf"\{c}" for c in "%&#$_{}"} | {"\\": r"\textbackslash{}"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_KINDS = "animation|figure|table"
_ENTRY = re.compile(rf"^<!-- ({_KINDS}) (\S+) -->\n.*?^<!-- end of \2 -->\n", re.M | re.S)


def check_parameters(
    namespace: Mapping[str, Any], *, known: Iterable[str], choices: Mapping[str, Sequence[Any]]
) -> None:
    """Refuse parameters that a notebook does not know; papermill by itself only warns of them.

    To be called in the first cell after the one tagged `parameters`, before there are other
    variables: a public name that is neither a module nor callable is taken for a parameter.

    Args:
        namespace: the notebook's `globals()`. Underscore names and IPython's In and Out are exempt.
        known: names of the parameters; each must be defined.
        choices: allowed values of some parameters; its keys count as known.

    Raises:
        ValueError: names every unknown or missing parameter and every value outside its choices,
            with the nearest known name or value.
    """
    names = list(dict.fromkeys([*choices, *known]))
    exempt = {*names, "In", "Out"}
    faults = [f"parameter {name} is not defined" for name in names if name not in namespace]
    for name, value in namespace.items():
        allowed = tuple(choices.get(name, (value,)))
        if value not in allowed:
            faults.append(f"parameter {name} = {value!r} is not allowed; {suggest(value, allowed)}")
        public = not (name in exempt or name.startswith("_"))
        if public and not (callable(value) or isinstance(value, ModuleType)):
            faults.append(f"unknown parameter {name} = {value!r}; {suggest(name, names)}")
    if faults:
        raise ValueError("\n".join(faults))


def as_list(value: str | Sequence[Any]) -> list[Any]:
    """A list parameter of a notebook: papermill's ``-p seeds "[0, 1]"`` hands it over as text.

    Raises:
        ValueError: neither a list nor the text of one, or an empty one.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f"expected a list such as [0, 1, 2], not {value!r}")
    return list(found)


def apply_style() -> None:
    """Set the collection's matplotlib style: 8 pt, seaborn's `colorblind`, editable text in PDF."""
    import seaborn as sns

    texts = "font. axes.title axes.label xtick.label ytick.label legend.font legend.title_font "
    texts += "figure.title figure.label"
    rc: dict[str, Any] = {f"{text}size": 8 for text in texts.split()}
    rc |= {"figure.figsize": (COLUMN, 2.3), "figure.dpi": 150, "savefig.dpi": 300}
    rc |= {"axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False}
    rc |= {"lines.linewidth": 1.2, "lines.markersize": 4, "figure.constrained_layout.use": True}
    # 42 embeds whole TrueType letters; DejaVu ships with matplotlib: the same figure everywhere.
    rc |= {"pdf.fonttype": 42, "font.sans-serif": ["DejaVu Sans"]}
    sns.set_theme(context="paper", style="ticks", palette="colorblind", rc=rc)


def method_style(method: str) -> dict[str, Any]:
    """Keyword arguments for `Axes.plot` that give a method the same look in every figure.

    Raises:
        ValueError: `method` is not a key of `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; {suggest(method, METHODS)}")
    return dict(METHODS[method])


def mean_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, int]:
    r"""Mean of independent runs and the half width of its Student t interval.

    .. math:: \bar x \pm t_{(1 + level) / 2,\, n - 1} \, s / \sqrt n, \quad
        s^2 = \sum_i (x_i - \bar x)^2 / (n - 1)

    Args:
        values: one number a run (seed), any unit; a record's None is no number.
        level: coverage, in (0, 1).

    Returns:
        mean and half width in the unit of `values`, and n; for n = 1 the half width is NaN.

    Raises:
        ValueError: no value, a value that is not finite, or a level outside (0, 1).
    """
    from scipy.stats import t

    x = [math.nan if v is None else float(v) for v in values]
    if not x or not all(map(math.isfinite, x)):
        raise ValueError(f"values must be one or more finite numbers, got {x}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    n, mean = len(x), math.fsum(x) / len(x)
    if n == 1:  # one run says nothing of the spread
        return mean, math.nan, 1
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / (n - 1))
    return mean, float(t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n), n


def format_mean(values: Iterable[float], *, digits: int = 1, level: float = 0.95) -> str:
    """`mean_interval` as text, "97.5 ± 0.3 (n = 5)"; a single run is "97.5 (n = 1)"."""
    mean, half, n = mean_interval(values, level)
    spread = "" if n == 1 else f" ± {half:.{digits}f}"
    return f"{mean:.{digits}f}{spread} (n = {n})"


def holm(differences: Mapping[Any, Sequence[float]]) -> dict[Any, float]:
    r"""p values of "the mean is zero", adjusted for how many differences are looked at.

    With the p values of m two-sided t tests in ascending order, Holm's adjustment is

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)})

    Whoever calls the means with values below 0.05 different from zero is wrong, once or more, in at
    most 5% of such studies, however the differences depend on each other.

    Args:
        differences: two or more numbers each, one a run (seed), under any names.

    Returns:
        the adjusted p values under the same names, in the same order.

    Raises:
        ValueError: as `mean_interval`, or a single number.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    from scipy.stats import t

    found = {}
    for name, values in differences.items():
        mean, half, n = mean_interval(values)
        if n == 1:
            raise ValueError(f"{name!r} has one value: no test of one run")
        error = half / float(t.ppf(0.975, n - 1))
        if error == 0:  # no spread at all
            found[name] = 1.0 if mean == 0 else 0.0
        else:
            found[name] = 2 * float(t.sf(abs(mean) / error, n - 1))
    adjusted, highest = {}, 0.0
    for i, name in enumerate(sorted(found, key=found.get)):
        highest = max(highest, min(1.0, (len(found) - i) * found[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in found}


def plot_mean(
    ax: Axes,
    x: Sequence[float],
    groups: Sequence[Sequence[float]],
    method: str,
    *,
    log: bool = False,
    **style: Any,
) -> None:
    """Draw the mean of each group over x in the method's look, with its 95% interval as a band.

    Args:
        ax: where.
        x: one position a group.
        groups: values of independent runs; a group of one has no band. A group without any value
            (all None: epochs without evaluation) is skipped.
        method: key of `METHODS`.
        log: means and intervals of the logarithm (geometric mean); values must be positive.
        style: changes of the look, for `Axes.plot`.

    Raises:
        ValueError: in a group some runs have a value and others None.
    """
    filled = [
        (at, g) for at, g in zip(x, groups, strict=True) if not g or any(v is not None for v in g)
    ]
    x, groups = [at for at, _ in filled], [g for _, g in filled]
    forward, back = (math.log, math.exp) if log else (float, float)
    found = [mean_interval([v if v is None else forward(v) for v in group]) for group in groups]
    look = method_style(method) | style
    ax.plot(x, [back(mean) for mean, _, _ in found], **look)
    halves = [0.0 if math.isnan(half) else half for _, half, _ in found]
    low, high = (
        [back(m + sign * h) for (m, _, _), h in zip(found, halves, strict=True)] for sign in (-1, 1)
    )
    ax.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)


def save_figure(
    fig: Figure, name: str, *, caption: str, records: Iterable[str | Path] = (), out: str | Path
) -> None:
    """Save `out/name.pdf` (vector, editable text) and `out/name.png` (300 dpi), and index them.

    Caption, records and commits stand in the metadata: PDF Title, Subject and Keywords; PNG text
    chunks Title, Description, Records and Commit. The size is the figure's own, never cropped.

    Args:
        fig: the figure; `apply_style` sets its look.
        name: file name without suffix, of lower-case letters, digits, `-` and `_`.
        caption: what it shows, with n and units.
        records: the run records behind it: paths of their JSON files, which must exist, or names.
        out: folder, made if absent.

    Raises:
        ValueError: a bad name, an empty caption, or a file in `records` that is no run record.
    """
    import matplotlib as mpl

    caption, listed, commit = _provenance(name, caption, records)
    png = {"Title": name, "Description": caption, "Records": listed, "Commit": commit}
    pdf = {"Title": name, "Subject": caption, "Keywords": f"records: {listed}; commit: {commit}"}
    with mpl.rc_context({"pdf.fonttype": 42, "savefig.bbox": None}):
        for suffix, metadata in (("pdf", pdf | {"CreationDate": None}), ("png", png)):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=suffix, dpi=300, metadata=metadata)
            write_atomically(Path(out) / f"{name}.{suffix}", buffer.getvalue())
    links = f"![{name}]({name}.png)\n\n{caption}\n\n[PDF]({name}.pdf), [PNG]({name}.png)."
    _index(Path(out), ("figure", name), f"{links} Records: {listed}. Commit: {commit}.")


def save_animation(
    animation: Animation,
    name: str,
    *,
    caption: str,
    records: Iterable[str | Path] = (),
    out: str | Path,
    fps: int = 12,
    dpi: int = 90,
) -> None:
    """Save `out/name.gif` and index it.

    Args:
        animation: of matplotlib.
        name, caption, records, out: as in `save_figure`.
        fps: frames a second.
        dpi: pixels an inch.

    Raises:
        ValueError: as `save_figure`.
    """
    from matplotlib.animation import PillowWriter

    caption, listed, commit = _provenance(name, caption, records)
    Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # the writer takes a path, not a buffer
        path = Path(folder, "animation.gif")
        animation.save(path, PillowWriter(fps=fps), dpi=dpi)
        write_atomically(Path(out) / f"{name}.gif", path.read_bytes())
    links = f"![{name}]({name}.gif)\n\n{caption}\n\n[GIF]({name}.gif)."
    _index(Path(out), ("animation", name), f"{links} Records: {listed}. Commit: {commit}.")


def save_table(
    frame: DataFrame,
    name: str,
    *,
    caption: str,
    records: Iterable[str | Path] = (),
    out: str | Path,
) -> None:
    """Save `out/name.csv` and `out/name.tex` (booktabs, label `tab:name`), and index them.

    Both begin with caption, records and commits as comments, `#` in the CSV (it is read back with
    `pandas.read_csv(..., comment="#")`) and `%` in the LaTeX. The index is kept if it is named.

    Args:
        frame: the table; cells are written as they are, so the caller rounds numbers.
        name, caption, records, out: as in `save_figure`.

    Raises:
        ValueError: as `save_figure`, or the table holds `#`, the comment sign.
    """
    caption, listed, commit = _provenance(name, caption, records)
    index = any(frame.index.names)
    csv = frame.to_csv(index=index, lineterminator="\n")
    if "#" in csv:
        raise ValueError(f"table {name!r} holds '#', the comment sign of its CSV; write it out")
    title = caption.translate(str.maketrans(_LATEX))
    tex = frame.to_latex(index=index, escape=True, caption=title, label=f"tab:{name}")
    for suffix, sign, text in (("csv", "#", csv), ("tex", "%", tex)):
        head = f"{sign} {caption}\n{sign} records: {listed}\n{sign} commit: {commit}\n"
        write_atomically(Path(out) / f"{name}.{suffix}", (head + text).encode())
    links = f"{caption}\n\n[CSV]({name}.csv), [LaTeX]({name}.tex)."
    _index(Path(out), ("table", name), f"{links} Records: {listed}. Commit: {commit}.")


def _provenance(name: str, caption: str, records: Iterable[str | Path]) -> tuple[str, str, str]:
    """Caption on one line, the records' names, and the commits of this code and of the runs."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"name must be lower-case letters, digits, '-' and '_', got {name!r}")
    if not caption.strip():
        raise ValueError(f"caption of {name!r} is empty; say what it shows, with n and units")
    names, runs = set(), set()
    for record in map(Path, records):
        if record.suffix == ".json":
            try:
                runs.add(str(json.loads(record.read_text("utf-8"))["provenance"]["commit"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"records: {record} is no run record ({error!r})") from error
            record = Path(record.parent.name, record.stem)
        names.add(record.as_posix())
    folders = Counter(posixpath.dirname(record) for record in names)
    for folder, count in folders.items():  # a folder of many runs is named once
        if folder and count > MOST_NAMES:
            names = {n for n in names if posixpath.dirname(n) != folder} | {f"{count} of {folder}"}
    commit = _code_commit() + (f" (runs at {', '.join(sorted(runs))})" if runs else "")
    return " ".join(caption.split()), ", ".join(sorted(names)) or "none", commit


def _code_commit() -> str:
    """Last commit that changed this package, with "-dirty" if it has been edited since.

    Not HEAD: the commit that adds a figure must not put that figure out of date.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args, "--", "."]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%h", "--abbrev=12")
        return (commit or "unknown") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or installed outside of a checkout
        return "unknown"


def _index(folder: Path, key: tuple[str, str], body: str) -> None:
    """Put an entry into the index: in place if it is there, else in the order of the names."""
    path = folder / "README.md"
    text = path.read_text("utf-8") if path.exists() else "# Figures and tables\n"
    entry = "<!-- {} {} -->\n## {}\n\n{}\n<!-- end of {} -->\n".format(*key, key[1], body, key[1])
    for match in _ENTRY.finditer(text):
        if match.groups() == key:
            text = text[: match.start()] + entry + text[match.end() :]
            break
        if match.groups()[::-1] > key[::-1]:
            text = text[: match.start()] + entry + "\n" + text[match.start() :]
            break
    else:
        text = f"{text.rstrip()}\n\n{entry}"
    write_atomically(path, text.encode())
