"""The processes that share one run: their number, what they agree on, and work that is split among them."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from reprotune.model.policies import Policy
from reprotune.process import LAUNCHED

Item = TypeVar("Item")
Result = TypeVar("Result")


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if LAUNCHED in os.environ else 1


def rank() -> int:
    return int(os.environ["RANK"]) if LAUNCHED in os.environ else 0


def is_main() -> bool:
    """True in the one process that writes outs."""
    return rank() == 0


def join() -> None:
    """Connect to the other processes, for a stage without a trainer; trainers connect by themselves."""
    if LAUNCHED in os.environ:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def on_any_process(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on at least one process."""
    values = torch.tensor(flags, dtype=torch.float32)
    if torch.distributed.is_initialized():
        values = values.to("cuda" if torch.cuda.is_available() else "cpu")
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """The trained weights are whole on every process inside a `with` block; ZeRO-3 shards them."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not hasattr(trained[0], "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(trained):
        yield


def dealt_out(
    items: Sequence[Item], compute: Callable[[Item], Result], label: str, done: int = 0
) -> Iterator[Result]:
    """Yield `compute` of each item after the first `done`, in order, on every process.

    Each process computes every world_size-th item. If the last round is short, its last item is computed by
    several: under ZeRO-3 a forward pass needs all processes.
    """
    world, own_rank = world_size(), rank()
    with tqdm(desc=label, unit="batch", total=len(items), initial=done) as bar:
        for start in range(done, len(items), world):
            computed: list[Any] = [compute(items[min(start + own_rank, len(items) - 1)])]
            if world > 1:
                own_result, computed = computed[0], [None] * world
                torch.distributed.all_gather_object(computed, own_result)
            computed = computed[: len(items) - start]
            bar.update(len(computed))
            yield from computed
