"""The processes that torchrun or ``accelerate launch`` started: who takes which share, and what all learn from all.

Everything that is waited for ends in an exchange of results or of what went wrong: a failure is no deadlock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from hf_immunize.errors import ProcessError


T = TypeVar("T")
# Shares are equal, machines need not be: this long a process may wait for the slowest.
_PATIENCE = timedelta(hours=2)


class Processes:
    """Some processes that do one piece of work together; `ALONE` is this one by itself."""

    def __init__(self, state: PartialState | None = None) -> None:
        self._state = state if state is not None and state.num_processes > 1 else None
        self.count = 1 if self._state is None else int(self._state.num_processes)
        self.index = 0 if self._state is None else int(self._state.process_index)

    @property
    def first(self) -> bool:
        """Whether this is the first, which writes and speaks for all."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list: contiguous, in the order of processes, of sizes that differ by 1."""
        if self._state is None:
            return list(items)
        with self._state.split_between_processes(list(items)) as part:
            return list(part)

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do something small on all processes, without a collective in it, and report to all, in their order.

        What it raises here is raised here; where it failed on another process, that is a `ProcessError`.
        """
        if self._state is None:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # raised below, when the others know
            failure = error
        sentence = None if failure is None else f"{type(failure).__name__}: {failure}"
        found: list[tuple[str | None, T]] = gather_object([(sentence, result)])
        if failure is not None:
            raise failure
        for number, (reason, _) in enumerate(found):
            if reason is not None:
                raise ProcessError(
                    f"Expected every process to do its share, found that process {number} of {self.count} failed: "
                    f"{reason}"
                )
        return [each for _, each in found]

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        """As `together`, for work that returns something large, which stays on its process; a collective."""
        own: list[T] = []
        self.together(lambda: own.append(work()))
        return own[0]

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        """Do something on the first process alone, and report to all what came of it; a collective."""
        return self.together(lambda: work() if self.first else None)[0]  # type: ignore[return-value]


ALONE = Processes()


def process_index() -> int:
    """This process's number among those that a launcher started, without joining them."""
    # A scheduler may set RANK for what it does not start in several processes; LOCAL_RANK is a launcher's.
    return int(os.environ.get("RANK", "0")) if "LOCAL_RANK" in os.environ else 0


def launched() -> Processes:
    """All processes that torchrun or ``accelerate launch`` started, else this one; to be called on all."""
    joined = dist.is_available() and dist.is_initialized()
    # A scheduler may set WORLD_SIZE for what it does not start in several processes; LOCAL_RANK is a launcher's.
    started = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not (joined or started):
        return ALONE
    # Unless it is set, accelerate takes several processes on CPUs for several runs of one.
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
    return Processes(PartialState(cpu=cpu, timeout=_PATIENCE))
