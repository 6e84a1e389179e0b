"""The order of training samples."""

import pytest

from data.encoding import Collator
from data.sampling import PADDING_SAMPLE, PaddedSamples, StepSampler


def test_length_grouped_batches_come_in_an_order_of_seed_and_epoch_alone():
    lengths = [10 * (i % 7) + i % 3 for i in range(101)]

    def order(seed=42, epoch=0):
        sampler = StepSampler(lengths, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order()
    assert sorted(first) == list(range(101)) and first == order()
    assert len({tuple(order(seed, epoch)) for seed, epoch in ((42, 0), (42, 1), (7, 0))}) == 3
    batches = [[lengths[i] for i in first[start : start + 4]] for start in range(0, 100, 4)]
    assert sum(max(batch) - min(batch) for batch in batches) < 0.2 * 25 * 60  # within a batch: alike
    means = [sum(batch) for batch in batches]
    falls = sum(a > b for a, b in zip(means, means[1:], strict=False))
    assert 5 < falls < 20  # between batches: no order


@pytest.mark.parametrize("strategy", ["group_by_length", "random", "sequential"])
def test_several_processes_get_whole_batches_and_see_each_sample_once(strategy):
    """10 samples, steps of 8 by 2 processes x 2 samples: the last step's 2 are filled up to one batch each."""
    lengths = [7, 3, 9, 1, 8, 2, 6, 4, 5, 10]
    alone, shared = (StepSampler(lengths, 8, 42, strategy, padded_to) for padded_to in (1, 4))
    assert list(shared) == [*alone, 10, 10] and len(shared) == 12 and sorted(alone) == list(range(10))
    samples = PaddedSamples([{"input_ids": [n]} for n in lengths])
    assert samples[10] == PADDING_SAMPLE and len(samples) == len([*samples]) == 10


def test_a_padding_sample_has_no_label_and_no_task():
    batch = Collator(routing=True)([PADDING_SAMPLE])
    assert batch["labels"].tolist() == [[-100]] and batch["task_ids"].tolist() == [-1]
    assert batch["routing_mask"].tolist() == [[1]]  # a mean over no token would be no number
