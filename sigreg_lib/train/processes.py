"""A function applied to many items in processes that may die without taking the others along."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any


class ProcessDied(RuntimeError):
    """The process of an item ended before it answered: killed, or out of memory."""


def each(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, ``function(item)``) as they are done, up to ``workers`` items at a time.

    For an item whose process died the second is a :class:`ProcessDied`; the other items go on, in a
    new process where there are more of them than workers. Leaving the loop early, as Ctrl-C does,
    ends all processes at once, and so does the end of the calling process, however it comes.

    Args:
        function: can be pickled; should return its errors rather than raise them, as one that it
            raises reads as the death of its process.
        items: can be pickled, as must be what the function returns.
        workers: at least 1.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    todo = list(reversed(list(items)))
    processes: dict[Connection, Any] = {}
    at_work: dict[Connection, Any] = {}

    def start() -> Connection:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(function, there))
        process.start()
        there.close()  # the other end is the process's own: closed by its death, it is seen here
        processes[here] = process
        return here

    def bury(end: Connection) -> ProcessDied:
        process = processes.pop(end)
        process.join()
        end.close()
        why = (
            "killed by that signal, as the system does where memory runs out"
            if process.exitcode < 0
            else "its own error is above; a script that starts workers needs the guard "
            'if __name__ == "__main__"'
        )
        return ProcessDied(f"its process ended with exit code {process.exitcode} ({why})")

    try:
        while todo or at_work:
            while todo and len(at_work) < workers:
                idle = (e for e, p in processes.items() if e not in at_work and p.is_alive())
                end = next(idle, None) or start()
                try:
                    end.send(todo[-1])
                except OSError:  # it died while idle: another takes the item
                    bury(end)
                else:
                    at_work[end] = todo.pop()
            for end in wait(list(at_work)):
                item = at_work.pop(end)
                try:
                    outcome = end.recv()
                except (EOFError, OSError):  # the second in the middle of its answer
                    outcome = bury(end)
                yield item, outcome
    finally:
        for end, process in processes.items():
            process.terminate()
            process.join()
            end.close()


def _serve(function: Callable[[Any], Any], there: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the caller ends this one
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    while True:
        there.send(function(there.recv()))


def _end_with_the_caller() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
