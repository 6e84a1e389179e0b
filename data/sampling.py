"""The order in which training sees its samples."""

import random

from torch.utils.data import Sampler

from data.encoding import IGNORED

STRATEGIES = ("group_by_length", "random", "sequential")
# Fills up the last step of several processes, each of which needs a batch: it has no label, and no task to route.
PADDING_SAMPLE = {"input_ids": [0], "labels": [IGNORED], "opening": 0, "task": ""}


class PaddedSamples(list):
    """A list of samples whose index `len` is PADDING_SAMPLE."""

    def __getitem__(self, index):
        return PADDING_SAMPLE if index == len(self) else super().__getitem__(index)


class StepSampler(Sampler):
    """Indices of samples, those of one optimiser step after those of the other.

    strategy: "sequential", "random", or "group_by_length": random, but samples of like length make a step, and the
    steps come in random order. (transformers' sampler of that name leaves each 50 batches sorted from long to short: on
    mixed tasks every such stretch, and the training's end, would be of one task only.)
    The order depends on seed, epoch and the samples of one step alone: a resumed run sees the steps it would have seen,
    however many processes share them. padded_to: the samples that all processes take at once; with several processes
    the order is filled up to a multiple of it with the index after the last.
    """

    def __init__(
        self, lengths: list[int], step_size: int, seed: int, strategy: str = "group_by_length", padded_to: int = 1
    ):
        self.lengths, self.step_size, self.seed, self.strategy = lengths, step_size, seed, strategy
        self.padding, self.epoch = -len(lengths) % padded_to, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.padding

    def __iter__(self):
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = range(len(self.lengths))
        if self.strategy != "sequential":
            order = rng.sample(order, len(order))
        if self.strategy == "group_by_length":
            order = self._grouped(order, rng)
        yield from order
        yield from [len(self.lengths)] * self.padding

    def _grouped(self, order: list[int], rng: random.Random) -> list[int]:
        stretch = 50 * self.step_size
        order = [
            index
            for start in range(0, len(order), stretch)
            for index in sorted(order[start : start + stretch], key=self.lengths.__getitem__)
        ]
        whole = len(order) // self.step_size * self.step_size
        steps = [order[start : start + self.step_size] for start in range(0, whole, self.step_size)]
        rng.shuffle(steps)
        return [index for step in [*steps, order[whole:]] for index in step]
