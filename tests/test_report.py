from __future__ import annotations

import itertools
import json
import math
import re
import subprocess

import matplotlib
import pandas as pd
import pytest
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from sigreg_lib import report

CAPTION = "Test accuracy (%) against λ, mean ± 95% interval over n = 5 seeds"


@pytest.fixture(autouse=True)
def restored_rc():
    with matplotlib.rc_context():
        yield


@pytest.fixture
def fig():
    figure = Figure(figsize=(report.COLUMN, 2.0))  # no pyplot: no window, no global state
    axes = figure.subplots()
    axes.plot([0, 1, 2], [1.0, 4.0, 9.0], **report.method_style("weak"))
    axes.set_title("A title with weight")
    return figure


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "records" / "main" / "vit-weak-s3.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"provenance": {"commit": "0123456789ab"}}))
    return path


def pdf_info(path) -> dict[str, str]:
    """The information dictionary of a PDF, read from its bytes: /Key (text) pairs."""
    info = {}
    for key, raw in re.findall(rb"/(\w+) \(((?:\\.|[^\\)])*)\)", path.read_bytes(), re.DOTALL):
        text = re.sub(rb"\\([()\\])", rb"\1", raw).replace(rb"\r", b"\r").replace(rb"\n", b"\n")
        utf16 = text.startswith(b"\xfe\xff")
        info[key.decode()] = text.decode("utf-16" if utf16 else "latin-1")
    return info


# saving figures


def test_both_files_carry_caption_records_and_commits(fig, record, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_code_commit", lambda: "abcdef012345")
    report.save_figure(fig, "lambda", caption=CAPTION, records=[record, "a-name"], out=tmp_path)
    records, commit = "a-name, main/vit-weak-s3", "abcdef012345 (runs at 0123456789ab)"
    with Image.open(tmp_path / "lambda.png") as image:
        chunks = image.text
    assert chunks["Title"] == "lambda"
    assert chunks["Description"] == CAPTION
    assert chunks["Records"] == records
    assert chunks["Commit"] == commit
    info = pdf_info(tmp_path / "lambda.pdf")
    assert info["Title"] == "lambda"
    assert info["Subject"] == CAPTION
    assert info["Keywords"] == f"records: {records}; commit: {commit}"


def test_png_has_300_dots_an_inch_of_the_figures_own_size(fig, tmp_path):
    with matplotlib.rc_context({"savefig.bbox": "tight"}):  # a user's setting that crops
        report.save_figure(fig, "size", caption=CAPTION, out=tmp_path)
    with Image.open(tmp_path / "size.png") as image:
        assert image.size == (round(300 * report.COLUMN), 600)


def test_text_in_the_pdf_is_truetype_without_a_style_applied(fig, tmp_path):
    with matplotlib.rc_context({"pdf.compression": 0}):
        report.save_figure(fig, "text", caption=CAPTION, out=tmp_path)
    data = (tmp_path / "text.pdf").read_bytes()
    assert b"/CIDFontType2" in data or b"/TrueType" in data
    assert b"/Type3" not in data


def test_saving_again_gives_the_same_bytes(fig, record, tmp_path):
    for _ in range(2):
        report.save_figure(fig, "same", caption=CAPTION, records=[record], out=tmp_path / "a")
    report.save_figure(fig, "same", caption=CAPTION, records=[record], out=tmp_path / "b")
    for name in ("same.pdf", "same.png", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert b"CreationDate" not in (tmp_path / "a" / "same.pdf").read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "same.pdf",
        "same.png",
    ]


def test_an_animation_is_saved_in_whole_and_indexed(fig, tmp_path):
    from matplotlib.animation import FuncAnimation
    from PIL import Image

    (line,) = fig.axes[0].plot([0, 1], [0, 1])
    moving = FuncAnimation(fig, lambda i: line.set_ydata([0, i]), frames=3)
    for folder in ("a", "b"):
        report.save_animation(moving, "moves", caption=CAPTION, out=tmp_path / folder, dpi=40)
    saved = tmp_path / "a" / "moves.gif"
    with Image.open(saved) as picture:
        assert picture.n_frames == 3 and picture.format == "GIF"
    assert saved.read_bytes() == (tmp_path / "b" / "moves.gif").read_bytes()
    index = (tmp_path / "a" / "README.md").read_text()
    assert "<!-- animation moves -->" in index and "![moves](moves.gif)" in index
    assert CAPTION in index and "[GIF](moves.gif)" in index
    with pytest.raises(ValueError, match="caption of 'still' is empty"):
        report.save_animation(moving, "still", caption="", out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file"
    report.write_atomically(path, b"old")
    with pytest.raises(TypeError):
        report.write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["Upper", "a/b", "a b", "", "../up", "fig.1"])
def test_refuses_a_name_that_is_no_plain_file_name(fig, tmp_path, name):
    with pytest.raises(ValueError, match="name must be"):
        report.save_figure(fig, name, caption=CAPTION, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_an_empty_caption(fig, tmp_path):
    with pytest.raises(ValueError, match="caption of 'a' is empty"):
        report.save_figure(fig, "a", caption=" \n", out=tmp_path)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"provenance": {}}'])
def test_refuses_a_record_that_is_missing_or_is_none(fig, tmp_path, text):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.json is no run record"):
        report.save_figure(fig, "a", caption=CAPTION, records=[path], out=tmp_path)


# the index


def test_index_is_sorted_keeps_other_text_and_replaces_an_entry_in_place(fig, tmp_path):
    index = tmp_path / "README.md"
    index.write_text("# Evidence\n\nWhat a paper cites.\n")
    for name in ("mid", "last", "first"):
        report.save_figure(fig, name, caption=f"Caption of {name}.", out=tmp_path)
    before = index.read_text() + "\nA note below.\n"
    index.write_text(before)
    assert before.startswith("# Evidence\n\nWhat a paper cites.\n\n<!-- figure first -->\n")
    assert re.findall(r"^## (.*)$", before, re.MULTILINE) == ["first", "last", "mid"]

    report.save_figure(fig, "last", caption="Caption of last.", out=tmp_path)
    assert index.read_text() == before
    report.save_figure(fig, "last", caption="A better one.", records=["r"], out=tmp_path)
    replaced = before.replace("Caption of last.", "A better one.").split("\n")
    line = next(i for i, text in enumerate(replaced) if "(last.pdf)" in text)
    replaced[line] = replaced[line].replace("Records: none", "Records: r")
    assert index.read_text() == "\n".join(replaced)


def test_a_table_and_a_figure_of_one_name_have_two_entries(fig, tmp_path):
    frame = pd.DataFrame({"a": [1]})
    for _ in range(2):
        report.save_table(frame, "main", caption="The table.", out=tmp_path)
        report.save_figure(fig, "main", caption="The figure.", out=tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("The table.") == text.count("The figure.") == 1
    assert text.index("The figure.") < text.index("The table.")


# tables


def test_csv_reads_back_as_the_table_and_says_where_it_comes_from(record, tmp_path):
    frame = pd.DataFrame({"recipe": ["vit/weak", "vit, none"], "test accuracy (%)": [72.0, 20.5]})
    report.save_table(frame, "t1", caption=CAPTION, records=[record], out=tmp_path)
    path = tmp_path / "t1.csv"
    pd.testing.assert_frame_equal(pd.read_csv(path, comment="#"), frame)
    head = path.read_text().split("\n")[:3]
    assert head[0] == f"# {CAPTION}"
    assert head[1] == "# records: main/vit-weak-s3"
    assert head[2].endswith("(runs at 0123456789ab)")


def test_latex_has_booktabs_rules_and_escapes_what_latex_reads_as_commands(tmp_path):
    frame = pd.DataFrame({"a_b": ["5% & more"]}, index=pd.Index(["x_1"], name="row"))
    report.save_table(frame, "t", caption="100% of $5, a_b ~ c^2 {\\x}.", out=tmp_path)
    head, _, tex = (tmp_path / "t.tex").read_text().partition("\\begin{table}")
    assert all(line.startswith("% ") for line in head.splitlines())
    escaped = r"100\% of \$5, a\_b \textasciitilde{} c\textasciicircum{}2 \{\textbackslash{}x\}."
    assert rf"\caption{{{escaped}}}" in tex
    assert all(rule in tex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"5\% \& more" in tex
    assert r"a\_b" in tex
    assert r"x\_1" in tex  # a named index is a column
    assert r"\label{tab:t}" in tex


def test_refuses_a_table_with_the_csv_comment_sign(tmp_path):
    with pytest.raises(ValueError, match="holds '#'"):
        report.save_table(pd.DataFrame({"# runs": [1]}), "t", caption=CAPTION, out=tmp_path)


# the commit


def git(folder, *args):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_is_the_last_that_changed_the_package_and_says_dirty(tmp_path, monkeypatch):
    module = tmp_path / "package" / "report.py"
    module.parent.mkdir()
    module.write_text("1")
    monkeypatch.setattr(report, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report._code_commit() == "unknown"  # no repository
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "code")
    code = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert report._code_commit() == code
    (tmp_path / "figure.png").write_text("x")
    git(tmp_path, "add", ".")
    assert report._code_commit() == code  # a staged figure does not make the code dirty
    git(tmp_path, "commit", "-q", "-m", "figure")
    assert report._code_commit() == code
    module.write_text("2")
    assert report._code_commit() == f"{code}-dirty"


# statistics


def test_interval_of_five_seeds_is_students():
    mean, half, n = report.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # s = sqrt(2.5); t quantile 0.975 at 4 degrees of freedom, from a printed table: 2.7764
    assert (mean, n) == (3.0, 5)
    assert half == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)


def test_interval_of_two_seeds_at_level_one_half_is_half_their_distance():
    # Student t with one degree of freedom is Cauchy, whose upper quartile is exactly 1
    assert report.mean_interval([10.0, 14.0], level=0.5) == (12.0, pytest.approx(2.0), 2)


def test_interval_agrees_with_scipys_own():
    from scipy import stats

    x = [71.9, 72.4, 70.8, 73.0]
    low, high = stats.t.interval(0.9, 3, loc=sum(x) / 4, scale=stats.sem(x))
    mean, half, _ = report.mean_interval(x, level=0.9)
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_interval_keeps_a_small_spread_on_a_large_mean():
    _, half, _ = report.mean_interval([1e9, 1e9 + 1e-3, 1e9 + 2e-3])
    # spacing of float64 at 1e9 is 1.2e-7, so s = 1e-3 keeps three digits
    assert half == pytest.approx(4.3027 * 1e-3 / math.sqrt(3), rel=1e-3)


def test_a_single_run_has_no_interval_and_says_so():
    mean, half, n = report.mean_interval([72.02])
    assert (mean, n) == (72.02, 1)
    assert math.isnan(half)
    assert report.format_mean([72.02]) == "72.0 (n = 1)"


def test_holm_steps_down_and_agrees_with_the_interval_for_one_difference():
    # n = 2: t has one degree of freedom, a Cauchy variable, p = 1 - 2 atan(t) / pi
    def pair(p):
        mean = math.tan(math.pi * (1 - p) / 2)  # over a standard error of 1
        return [mean - 1, mean + 1]

    p = {"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.013}
    found = report.holm({name: pair(value) for name, value in p.items()})
    # in order: 4 x 0.01, 3 x 0.013 (below the one before: raised to it), 2 x 0.03, 1 x 0.04
    assert list(found) == list(p)
    assert found == pytest.approx({"c": 0.06, "a": 0.04, "d": 0.06, "b": 0.04}, rel=1e-9)
    values = [1.0, 2.0, 4.0, 3.5, 0.3]
    mean, _, _ = report.mean_interval(values)
    alone = report.holm({"x": values})["x"]
    assert report.mean_interval(values, 1 - alone)[1] == pytest.approx(mean)


def test_holm_of_constants_and_of_single_runs():
    assert report.holm({"none": [0.0, 0.0], "all": [2.0, 2.0]}) == {"none": 1.0, "all": 0.0}
    assert report.holm({}) == {}
    with pytest.raises(ValueError, match="'x' has one value"):
        report.holm({"x": [1.0]})


def test_format_has_mean_interval_and_n():
    # half width 12.706 * sqrt(0.02) / sqrt(2) = 1.2706
    assert report.format_mean([97.4, 97.6]) == "97.5 ± 1.3 (n = 2)"
    assert report.format_mean([97.4, 97.6], digits=2) == "97.50 ± 1.27 (n = 2)"


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [1.0, None]])
def test_refuses_to_average_nothing_or_a_diverged_run(values):
    with pytest.raises(ValueError, match="one or more finite numbers"):
        report.mean_interval(values)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_refuses_a_level_that_is_no_probability(level):
    with pytest.raises(ValueError, match="level must lie in"):
        report.mean_interval([1.0, 2.0], level)


# style


def test_methods_are_told_apart_without_colour():
    for a, b in itertools.combinations(report.METHODS.values(), 2):
        assert a["linestyle"] != b["linestyle"]
        assert a["marker"] != b["marker"]


def test_methods_have_the_palettes_colours_and_published_points_are_hollow_black():
    palette = set(sns.color_palette("colorblind").as_hex())
    assert {report.METHODS[m]["color"] for m in ("none", "strong", "weak")} <= palette
    published = report.method_style("published")
    assert to_hex(published["color"]) == "#000000"
    assert published["markerfacecolor"] == "none"


def test_the_style_map_cannot_be_changed_through_a_copy():
    report.method_style("weak")["color"] = "red"
    assert report.METHODS["weak"]["color"] == "#de8f05"


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown method 'stong'; did you mean 'strong'"):
        report.method_style("stong")


def test_every_text_of_a_styled_figure_is_8_point():
    matplotlib.use("Agg")
    report.apply_style()
    fig, axes = plt.subplots()
    axes.plot([0, 1], label="x")
    legend = axes.legend(title="t")
    fig.suptitle("s")
    fig.supxlabel("x")
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *fig.texts]
    texts += [*axes.get_xticklabels(), *axes.get_yticklabels(), legend.get_title()]
    texts += [*legend.get_texts(), axes.text(0, 0, "free")]
    plt.close(fig)
    assert {text.get_fontsize() for text in texts} == {8.0}
    assert fig.get_figwidth() == report.COLUMN


# parameters of a notebook

PARAMETERS = {"budget": "recorded", "seeds": [0, 1], "out": None}


def check(**changes):
    namespace = {"__name__": "__main__", "_i1": "", "In": [], "Out": {}, "math": math, "exit": exit}
    report.check_parameters(
        namespace | PARAMETERS | changes, known=["seeds", "out"], choices={"budget": report.BUDGETS}
    )


@pytest.mark.parametrize("budget", report.BUDGETS)
def test_accepts_the_known_parameters_among_ipythons_own_names(budget):
    check(budget=budget)


def test_an_unknown_parameter_is_named_with_its_value_and_the_nearest():
    with pytest.raises(ValueError) as error:
        check(seed=3)
    assert str(error.value) == (
        "unknown parameter seed = 3; did you mean 'seeds'? known: budget, seeds, out"
    )


def test_a_value_outside_its_choices_is_named_with_the_nearest():
    with pytest.raises(ValueError) as error:
        check(budget="smok")
    assert str(error.value) == (
        "parameter budget = 'smok' is not allowed; did you mean 'smoke'? "
        "known: recorded, smoke, cpu, full"
    )


def test_all_faults_are_told_at_once():
    with pytest.raises(ValueError) as error:
        check(budget=1, sneeds=2, zzz=3)
    assert [line.split(";")[0] for line in str(error.value).split("\n")] == [
        "parameter budget = 1 is not allowed",
        "unknown parameter sneeds = 2",
        "unknown parameter zzz = 3",
    ]


def test_a_known_parameter_that_the_notebook_lacks_is_refused():
    with pytest.raises(ValueError, match="parameter device is not defined"):
        report.check_parameters({"budget": "cpu"}, known=["budget", "device"], choices={})


def test_lists_come_as_lists_or_as_the_text_that_papermill_passes():
    assert report.as_list([0, 1]) == report.as_list("[0, 1]") == [0, 1]
    for wrong in ("0, 1", "[0, 1", "3", [], "[]", 5):
        with pytest.raises(ValueError, match="expected a list"):
            report.as_list(wrong)


@pytest.mark.parametrize("log", [False, True])
def test_a_plotted_mean_and_band_are_the_interval(log):
    import matplotlib.pyplot as plt

    groups = [[1.0, 2.0, 4.0], [8.0]]
    fig, ax = plt.subplots()
    report.plot_mean(ax, [3, 5], groups, "weak", log=log)
    (line,), (band,) = ax.lines, ax.collections
    logs = [math.log(v) if log else v for v in groups[0]]
    mean, half, _ = report.mean_interval(logs)
    back = math.exp if log else float
    assert line.get_ydata() == pytest.approx([back(mean), 8.0])
    heights = [y for x, y in band.get_paths()[0].vertices if x == 3]
    assert min(heights) == pytest.approx(back(mean - half))
    assert max(heights) == pytest.approx(back(mean + half))
    plt.close(fig)


def test_epochs_without_evaluation_are_not_drawn_and_gaps_in_some_runs_are_refused():
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    report.plot_mean(ax, [1, 2, 3], [[None, None], [2.0, 4.0], [5.0, 5.0]], "weak")
    assert ax.lines[0].get_xydata().tolist() == [[2.0, 3.0], [3.0, 5.0]]
    with pytest.raises(ValueError, match="one or more finite numbers"):
        report.plot_mean(ax, [1], [[None, 2.0]], "weak", log=True)
    with pytest.raises(ValueError, match="one or more finite numbers"):
        report.plot_mean(ax, [1], [[]], "weak")
    plt.close(fig)


def test_many_records_of_one_folder_are_counted_and_few_are_named(fig, tmp_path):
    names = [f"grid/run-s{i}" for i in range(13)] + ["main/a-s0", "main/b-s0"]
    report.save_figure(fig, "many", caption=CAPTION, records=names, out=tmp_path)
    index = (tmp_path / "README.md").read_text()
    assert "Records: 13 of grid, main/a-s0, main/b-s0." in index
