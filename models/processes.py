"""Several processes of one command (torchrun, accelerate launch): they share the batches, and the first one writes."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from config import UserError


def join_processes() -> None:
    """Meet the other processes of this command, if there are any, each on a GPU of its own; the first one speaks."""
    several = "RANK" in os.environ  # as a launcher sets it
    # the first one may wait as long as another needs for its last batch
    state = PartialState(cpu=not torch.cuda.is_available(), **({"timeout": timedelta(days=1)} if several else {}))
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def is_first() -> bool:
    return PartialState().is_main_process


def on_first_process(action: Callable):
    """What `action` returns, called in the first process alone. Its UserError ends the others too, silently."""
    outcome, error = [None], None
    if is_first():
        try:
            outcome = [action()]
        except UserError as raised:
            error = raised
    if PartialState().num_processes > 1:
        broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[0] is None:
        sys.exit(2)
    return outcome[0]


def own_share(batches: list) -> list:
    """Every n-th of the batches, so that like ones are shared alike."""
    state = PartialState()
    return batches[state.process_index :: state.num_processes]


def merge_shares(share: dict) -> dict:
    """The dicts of all processes as one, in each of them."""
    merged = {}
    for part in gather_object([share]):
        merged |= part
    return merged


def answers_of_all(numbers: Iterable[int], answer: Callable[[int], list]) -> Iterator:
    """The answers to all batches, by their numbers, in each process: each process takes its turn's batch, and what was
    answered in a turn is told to all before the next, so that a stopped command loses one turn."""
    numbers = list(numbers)
    for start in range(0, len(numbers), PartialState().num_processes):
        turn = numbers[start : start + PartialState().num_processes]
        yield from gather_object([one for number in own_share(turn) for one in answer(number)])


def check_one_process(what: str) -> None:
    """UserError where a launcher has started several processes for `what`, a flag that one does."""
    if PartialState().num_processes > 1:
        raise UserError(f"{what}: is for one process; run it without torchrun or accelerate launch")
