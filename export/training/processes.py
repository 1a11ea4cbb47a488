"""The processes that train together: one, or those that `accelerate launch` starts on several GPUs and hosts."""

import atexit
from collections.abc import Iterable
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor


class Processes:
    """This process among all: its `device`, its `rank`, their `count`, and whether it is the one that writes (`main`).

    `with processes.first()`: the main process runs the block before the others.
    """

    def __init__(self) -> None:
        # Several processes on CPUs are started by torchrun: `accelerate launch --cpu` starts a single one.
        # The others wait while the main one encodes prompts, which may take hours, and saves.
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
        # Gloo's threads may still hold the last tensors, and freeing them while the interpreter ends aborts it (pytorch/pytorch#179291).
        atexit.register(state.destroy_process_group)
        self.first = state.main_process_first
        self.device, self.rank, self.count, self.main = state.device, state.process_index, state.num_processes, state.is_main_process

    def mean(self, tensors: Iterable[Tensor]) -> None:
        """Averages each tensor over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)
                tensor /= self.count

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers, the same in each."""
        if self.count == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def share(self, total: int) -> range:
        """The numbers of this process's samples, of a step's `total`."""
        part = total // self.count
        return range(self.rank * part, (self.rank + 1) * part)
