"""Training rows that no run was aligned on: what settings are chosen by, never the test half."""

from config import UserError
from data.sources import Record, answer_records, draw, prompt_of, read_rows, trainable_rows


def changed_file(trained_on: dict[str, str] | None, now: dict[str, str]) -> str | None:
    """The first of the files that a run was trained on (name: sha256, as run.json has them) whose content is another
    now: nobody knows which of its rows were drawn. None where there is none."""
    return next((file for file in sorted(now) if (trained_on or {}).get(file, now[file]) != now[file]), None)


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
