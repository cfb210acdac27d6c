import subprocess
import sys

import pytest
from helpers import ROOT

from sigreg_lib import records
from sigreg_lib.__main__ import main

SMALL = ["--set", "depth=2", "--set", "width=32", "--set", "epochs=2"]


def folders(tmp_path):
    return ["--results", str(tmp_path / "r"), "--checkpoints", str(tmp_path / "c")]


def test_list_has_a_line_for_each_row(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vit/none ") and "(1 - lam) CE, lam 0.1," in lines[0]
    said = {line.split()[0]: line for line in lines}
    assert "(1 - lam) CE + lam Strong, lam 0.01, K 64," in said["mlp/strong"]
    assert "CE + lam Weak, lam 0.1, K 64" in said["vit-text/weak"].split("adamw 0.001, ")[1]
    assert " CE, 400 epochs" in said["vit-text/none"]


def test_show_prints_overridden_settings(capsys):
    assert main(["show", "vit/weak", "--set", "lam=0.3"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["lam"] == "0.3" and shown["rand_augment"] == "[2, 9]"


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        (["regularizer=strong"], True),
        (["mode=corrected"], True),
        (["regularizer=strong", "lam=0.01"], False),
        (["regularizer=none"], False),
        (["mode=paper"], False),
        (["sketch_dim=16"], False),
    ],
)
def test_another_loss_that_keeps_the_recipe_s_lambda_is_noted(settings, noted, capsys):
    assert main(["show", "mlp/weak", *(f"--set={s}" for s in settings)]) == 0
    assert ("lam stays mlp/weak's" in capsys.readouterr().err) == noted


def test_run_trains_prints_a_line_an_epoch_and_writes_the_record(tmp_path, capsys):
    assert main(["run", "digits/weak", "--seed", "3", *SMALL, *folders(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "-s3 on digits, epoch 2/2" in lines[1] and "R " in lines[1]
    path = tmp_path / "r/digits/digits-weak+width=32+depth=2+epochs=2-s3.json"
    assert lines[2].endswith(f"finished at epoch 2, record {path}")
    record = records.read(path)
    assert record.seed == 3 and record.status == "finished"
    assert f"test {record.last['test_accuracy']:.2f}%" in lines[1]


@pytest.mark.parametrize("command", ["run", "sweep"])
@pytest.mark.parametrize(("name", "noted"), [("mlp/none", True), ("digits/none", False)])
def test_a_row_of_cifar_100_that_trained_on_the_digits_is_noted(
    command, name, noted, tmp_path, capsys
):
    small = [*SMALL, "--set", "precision=float32"]
    assert main([command, name, *small, *folders(tmp_path)]) == 0
    assert ("settings for CIFAR-100" in capsys.readouterr().err) == noted


def test_run_evaluates_as_often_as_asked(tmp_path):
    command = ["run", "digits/none", *SMALL, "--evaluate-every", "2", *folders(tmp_path)]
    assert main(command) == 0
    (path,) = (tmp_path / "r").rglob("*.json")
    assert [a is None for a in records.read(path).history["test_accuracy"]] == [True, False]


def test_a_batched_sweep_trains_all_seeds_of_a_recipe_at_once(tmp_path, capsys):
    command = ["sweep", "digits/none", "digits/weak", "--seeds", "4", "2", *SMALL, "--batched"]
    assert main([*command, *folders(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    found = [record for _, record in records.select(tmp_path / "r")]
    assert [r.seed for r in found] == [2, 4, 2, 4]
    assert all(r.provenance["batched"] == [4, 2] for r in found)


def test_sweep_says_how_many_runs_there_are_and_prints_a_line_a_run(tmp_path, capsys):
    command = ["sweep", "digits/none", "digits/weak", "--seeds", "0", "1", *SMALL]
    assert main([*command, *folders(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 runs; a line as each ends"
    assert [line.split()[0] for line in lines[1:]] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "vit/weka"], "did you mean 'vit/weak'"),
        (["run", "vit/weak", "--set", "lamb=0.3"], "did you mean 'lam'"),
        (["run", "vit/weak", "--set", "lam"], "name=value"),
        (["run", "vit/weak", "--set", "lam=2"], "lam must lie in [0, 1]"),
        (["run", "vit/weak", "--epochs", "0"], "epochs must lie in 1..400"),
        (["run", "vit/weak", "--seed", "-1"], "seed must be"),
        (["run", "vit/weak", "--device", "gpu"], "device must be"),
        (["run", "vit/weak", "--data", "/no/such/folder"], "/no/such/folder"),
        (["show", "nothing"], "unknown recipe 'nothing'; known: vit/none, "),
        (["sweep", "mlp/none", "--seeds", "0", "0"], "given twice"),
        (["sweep", "mlp/none", "--epochs", "500"], "epochs must lie in 1..400"),
        (["sweep", "vit/none", "--batched"], "vit/none cannot be trained batched"),
        (["sweep", "mlp/none", "--batched", "--compile"], "batched steps are not compiled"),
        (["sweep", "mlp/none", "--device", "cpu", "--capture"], "capture=True records a CUDA"),
        (["run", "mlp/none", "--device", "cpu", "--capture"], "capture=True records a CUDA"),
        (["sweep", "mlp/none", "--data", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, capsys, tmp_path):
    more = [] if arguments[0] == "show" else folders(tmp_path)
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("sigreg: error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "vit/weak", "--epochs", "x"],
        ["run", "vit/weak", "--evaluate-every", "0"],
    ],
)
def test_a_malformed_command_exits_with_two_and_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: sigreg" in capsys.readouterr().err


def test_a_diverged_run_is_exit_code_one(tmp_path, capsys):
    settings = ["--set", "lr=1e30", "--set", "optimizer=sgd", "--set", "epochs=30", *SMALL[:4]]
    assert main(["run", "digits/none", *settings, *folders(tmp_path)]) == 1
    assert "DIVERGED" in capsys.readouterr().out

    assert main(["sweep", "digits/none", *settings, *folders(tmp_path / "sweep")]) == 1


def test_help_explains_every_command():
    shown = subprocess.run(
        [sys.executable, "-m", "sigreg_lib", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert all(f"    {c}" in shown.stdout for c in ("run", "sweep", "list", "show"))


def test_the_package_needs_torch_torchvision_and_numpy_alone():
    """Importing everything that trains loads none of the heavy optional packages."""
    optional = ["pyarrow", "pandas", "matplotlib", "seaborn", "sklearn", "IPython", "scipy"]
    code = (
        "import sys, sigreg_lib.__main__, sigreg_lib.paper, sigreg_lib.diagnostics\n"
        f"print([m for m in {optional} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr
