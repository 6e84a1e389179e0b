"""Token ids in batches of like length, padded by position: a tokenizer without a pad token, as Llama-2's, will do."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def batches_by_length(items: Sequence, length: Callable, batch_size: int) -> list[list]:
    """The items in batches of like length, longest first: what does not fit in memory shows at once."""
    ordered = sorted(items, key=length, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def pad(rows: list[list[int]], *, left: bool, value: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (B, T): rows filled up with `value` to the longest, before (left) or after them.

    The mask is 1 on what a row holds: it alone says what is padding, whatever the value.
    """
    length = max(map(len, rows))

    def filled(rows: list[list[int]], value: int) -> Tensor:
        fill = [[value] * (length - len(row)) for row in rows]
        return torch.tensor([f + r if left else r + f for f, r in zip(fill, rows, strict=True)])

    return filled(rows, value), filled([[1] * len(row) for row in rows], 0)
