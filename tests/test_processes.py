"""Processes that may die: what of the others, and what is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from sigreg_lib.train.processes import ProcessDied, each


def squared_unless_three(item: int) -> tuple[int, int]:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item, os.getpid()


def dies_in_the_middle_of_its_answer(item: int) -> int:
    if item == 1:
        for descriptor in Path("/proc/self/fd").iterdir():  # the pipe to the caller is a socket
            if "socket" in os.readlink(descriptor):
                os.write(int(descriptor.name), struct.pack("!i", 1000) + b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def says_its_process_and_sleeps(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_item_whose_process_is_killed_is_named_and_the_others_are_done(workers):
    outcomes = dict(each(squared_unless_three, range(6), workers))
    died = outcomes.pop(3)
    assert isinstance(died, ProcessDied) and "exit code -9" in str(died)
    assert {item: square for item, (square, _) in outcomes.items()} == {
        item: item * item for item in (0, 1, 2, 4, 5)
    }
    assert len({process for _, process in outcomes.values()}) <= workers + 1  # one is a new one
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the pipe through /proc")
def test_a_process_killed_in_the_middle_of_its_answer_is_named_too():
    outcomes = dict(each(dies_in_the_middle_of_its_answer, range(4), 2))
    assert isinstance(outcomes.pop(1), ProcessDied)
    assert outcomes == {0: 0, 2: 2, 3: 3}


def test_no_items_need_no_process():
    assert list(each(squared_unless_three, [], 2)) == []


def test_leaving_the_loop_ends_the_processes():
    loop = each(squared_unless_three, range(6), 2)
    assert next(loop)[0] in (0, 1) and multiprocessing.active_children()
    loop.close()
    assert multiprocessing.active_children() == []


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited for a minute in vain")


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(how, tmp_path):
    script = (
        "import signal\n"
        "from pathlib import Path\n"
        "from test_processes import each, says_its_process_and_sleeps\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in the background: ignored
        f"list(each(says_its_process_and_sleeps, 3 * [Path({str(tmp_path)!r})], 2))\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    caller = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        workers = [int(path.name) for path in tmp_path.iterdir()]
        assert all(map(runs, workers))
        if how == signal.SIGINT:
            os.killpg(caller.pid, how)  # as a terminal's Ctrl-C does
        else:
            caller.send_signal(how)
        assert caller.wait(timeout=60) != 0
        wait_until(lambda: not any(map(runs, workers)))
    finally:
        if caller.poll() is None:
            os.killpg(caller.pid, signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 2  # the third item was never begun
