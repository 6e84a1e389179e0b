"""Training rows that no run was aligned on: what settings are chosen by, never the test half."""

import json

from config import UserError
from data.sources import Record, answer_records, draw, prompt_of, read_rows, source_dir, trainable_rows

SPLIT_FILE = "split.json"  # beside the folders that data/split.py deals out


def dealt_from(source: str) -> dict[str, str]:
    """The checksums of the files that data/split.py has dealt this folder from; {} for another folder."""
    made = None if source == "hub" else source_dir(source).parent / SPLIT_FILE
    if made is None or not made.exists():
        return {}
    dealt = json.loads(made.read_text(encoding="utf-8"))
    ours = isinstance(dealt, dict) and isinstance(dealt.get("made_by"), dict)  # another's file may have that name too
    return dealt["made_by"].get("data_sha256", {}) if ours else {}


def held_apart_records(
    tasks: tuple[str, ...], source: str, num_trained: int, num_held_apart: int, seed: int
) -> dict[str, list[Record]]:
    """Per task the records of `num_held_apart` training prompts, one row each, that an alignment on `num_trained` rows
    with `seed` has not drawn; of several good answers to a prompt all. UserError if too few prompts are left."""
    records = {}
    for task in tasks:
        rows = trainable_rows(task, read_rows(task, "train", source))
        seen = {prompt_of(row) for row in draw(rows, num_trained, seed)}
        others = list({prompt_of(row): row for row in rows if prompt_of(row) not in seen}.values())
        if len(others) < num_held_apart:
            raise UserError(
                f"--data_source {source}: {len(others)} training prompts of {task} are left beside the {num_trained} "
                f"rows trained on, {num_held_apart} are needed; take fewer"
            )
        records[task] = answer_records(task, draw(others, num_held_apart, seed))
    return records
