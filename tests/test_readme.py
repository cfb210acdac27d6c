"""The README tells the truth: its numbers come from records, its names exist."""

import json
import re

import pytest
from helpers import ROOT

from sigreg_lib import records, report, tables
from sigreg_lib.paper import published
from sigreg_lib.recipes import RECIPES

SEEDS = (0, 1, 2)
README = (ROOT / "README.md").read_text()
ROWS = re.findall(
    r"^\| (\S+/\S+) \| (\d+) \| ([\d.]+) \| ([\d.]+(?:(?: ± |, )[\d.]+)?) \| (\d+) \| (.+) \|$",
    README,
    re.M,
)


def test_the_table_of_runs_is_found():
    assert len(ROWS) == 9


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_of_the_table_is_what_the_records_and_the_paper_say(row):
    name, epoch, theirs, ours, n, verdict = row
    curve, at = published(name).curve, int(epoch)
    group = records.select(ROOT / "figures/records/cifar100", recipe=name)
    runs = [r for _, r in group if not r.overrides]
    assert all(r.dataset == "cifar100" for r in runs)
    found = [r.at(at)["test_accuracy"] for r in runs if r.epochs >= at]
    assert len(found) == int(n)
    mean = report.format_mean(found, digits=2).removesuffix(f" (n = {n})")
    assert ours == (mean if len(found) != 2 else ", ".join(f"{a:.2f}" for a in sorted(found)))
    assert float(theirs) == curve[at]
    assert not any(r.epochs >= later for r in runs for later in curve if later > at)
    family = tables.collect(ROOT / "figures/records", name.split("/")[0], SEEDS)
    (judged,) = (tables.verdict(row) for row in family if row.published.name == name)
    assert str(judged) == verdict


@pytest.mark.parametrize(("number", "family"), [(1, "vit"), (2, "expert"), (3, "mlp")])
def test_the_committed_tables_are_what_the_records_give(tmp_path, number, family):
    rows = tables.collect(ROOT / "figures/records", family, SEEDS)
    report.save_table(tables.results_table(rows), "made", out=tmp_path, caption="-", records=[])
    made, kept = (
        [line for line in path.read_text().splitlines() if not line.startswith("#")]
        for path in (tmp_path / "made.csv", ROOT / f"figures/table{number}.csv")
    )
    assert made == kept


def test_every_file_that_the_readme_links_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links), links


def test_every_recipe_and_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make (\w+)", README, re.M))
    assert named and named <= targets
    recipes = set(re.findall(r"\b(?:vit|expert|mlp|digits)[\w-]*/(?:none|weak|strong)\b", README))
    assert recipes and recipes <= set(RECIPES)


def test_every_name_that_the_readme_imports_exists():
    import sigreg_lib

    names = re.findall(r"from sigreg_lib import ([\w, ]+)", README)
    assert names and all(hasattr(sigreg_lib, n.strip()) for line in names for n in line.split(","))


def test_the_loop_of_the_readme_runs_as_pasted():
    (block,) = re.findall(r"```python\n(import torch.*?)```", README, re.S)
    found = {}
    exec(block, found)
    assert list(found["handle"].names) == ["0", "2"] and found["loss"].isfinite()


def test_the_floor_that_the_readme_quotes_is_the_computed_one():
    from sigreg_lib import weak_floor

    (n, c, k, floor, collapse) = re.search(
        r"N = (\d+), C = (\d+), K = (\d+) Weak's floor is (\d+\.\d), while total collapse "
        r"costs (\d+\.\d)",
        README,
    ).groups()
    assert f"{weak_floor(int(n), int(c), int(k)):.1f}" == floor
    assert f"{int(k) ** 0.5:.1f}" == collapse


def test_the_speeds_that_the_readme_quotes_are_the_measured_ones():
    found = json.loads((ROOT / "figures/bench/cpu.json").read_text())
    losses = {
        (row["loss"], row["n"], row["c"], row["layers"]): row["ratio"]["median"]
        for row in found["losses"]["rows"]
    }
    strong = [losses["strong", *size, 1] for size in ((128, 256), (128, 1024), (8192, 768))]
    weak = [ratio for (loss, *_, layers), ratio in losses.items() if (loss, layers) == ("weak", 1)]
    six = [losses[loss, 128, 256, 6] for loss in ("strong", "weak")]
    steps = {row["family"]: row for row in found["steps"]["rows"]}
    whole = {family: row["ratio"]["none"]["median"] for family, row in steps.items()}
    added = {m: 100 * (v["median"] - 1) for m, v in steps["mlp"]["added"].items()}
    most = {m: 100 * (v["most"] - 1) for m, v in steps["vit"]["added"].items()}
    assert all(v["least"] < 1.005 for v in steps["vit"]["added"].values())  # "nothing"
    for words in (
        f"{strong[0]:.1f} times as fast at N = 128, C = 256, K = 64, {strong[1]:.1f} times at "
        f"C = 1024 and {strong[2]:.1f} times at N = 8192, C = 768",
        f"Weak {min(weak):.1f} to {max(weak):.1f} times",
        f"in one call {six[0]:.1f} (Strong) and {six[1]:.1f} times (Weak)",
        f"{whole['vit']:.1f} (vit), {whole['expert']:.1f} (expert) and {whole['mlp']:.1f} times",
        f"nothing and {most['weak']:.1f}% (Weak) or {most['strong']:.1f}% (Strong)",
        f"mlp step of {1e3 * steps['mlp']['seconds']['ours none']:.0f} ms",
        f"Weak adds {added['weak']:.0f}% and Strong {added['strong']:.0f}%",
    ):
        assert words in README, words
