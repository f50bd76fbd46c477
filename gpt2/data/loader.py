"""Batches on the device. A thread prepares the next micro-batch while the current one is used."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from gpt2.data.sampler import Sampler

Batch = tuple[Tensor, Tensor]


class BatchLoader:
    """Inputs and targets of each micro-batch, both (batch_size, sequence_length), from a step to the end of the run."""

    def __init__(self, sampler: Sampler, start_step: int, max_steps: int, device: torch.device) -> None:
        self.sampler, self.max_steps, self.device = sampler, max_steps, device
        self._thread = ThreadPoolExecutor(max_workers=1)
        self.seek(start_step)

    def seek(self, step: int) -> None:
        """Continues with the first micro-batch of `step`."""
        self._places = self._places_from(step)
        self._prepared = self._prepare_next()

    def next(self) -> Batch:
        """The next micro-batch. Raises the errors of the thread, and StopIteration after the last step."""
        if self._prepared is None:
            raise StopIteration
        inputs, targets = self._prepared.result()
        self._prepared = self._prepare_next()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Stops the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _places_from(self, step: int) -> Iterator[tuple[int, int]]:
        micro_steps = range(self.sampler.gradient_accumulation_steps)
        return ((s, micro_step) for s in range(step, self.max_steps) for micro_step in micro_steps)

    def _prepare_next(self) -> Future[Batch] | None:
        place = next(self._places, None)
        return None if place is None else self._thread.submit(self._prepare, *place)

    def _prepare(self, step: int, micro_step: int) -> Batch:
        pair = (torch.from_numpy(array) for array in self.sampler.batch(step, micro_step))
        inputs, targets = (each.pin_memory() if self.device.type == "cuda" else each.contiguous() for each in pair)
        return inputs, targets
