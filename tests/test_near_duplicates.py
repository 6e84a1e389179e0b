"""Held-out questions that the training half nearly has are counted."""

from conftest import write_jsonl

from config import TASKS
from data.near_duplicates import near_duplicates


def test_the_same_and_the_nearly_same_are_counted(tiny_source):
    rows = {
        split: [
            {"id": f"{split}-{i}", "instruction": text, "input": "", "output": "Yes."} for i, text in enumerate(texts)
        ]
        for split, texts in {
            "train": ["Name three rivers of Portugal, longest first.", "How is cheese made from goat milk?"],
            "test": [
                "how is cheese made from goat milk? ",
                "Name three rivers of Portugal, longest first!",
                "Write a limerick about a lighthouse.",
                "Write a limerick about a lighthouse.",
            ],
        }.items()
    }
    for split, some in rows.items():
        write_jsonl(tiny_source / f"helpfulness_{split}.jsonl", some)
    counts = near_duplicates(TASKS, str(tiny_source))
    assert list(counts) == list(TASKS)
    assert counts["helpfulness"] == {"questions": 3, "same": 1, "near": 2}


def test_the_sample_has_none():
    assert all(count["same"] == count["near"] == 0 for count in near_duplicates(TASKS, "sample").values())
