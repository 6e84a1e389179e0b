"""Training rows that no run was aligned on: what settings are chosen by, never the test half."""

import json
from dataclasses import asdict, dataclass

from config import UserError
from data.sources import Record, answer_records, draw, prompt_of, read_rows, source_dir, trainable_rows

SPLIT_FILE = "split.json"  # beside the folders that data/split.py deals out


@dataclass(frozen=True)
class Drawn:
    """The training rows that a run has seen: `num_samples` of each task (-1: all) drawn with `seed` from the files
    data_sha256 (name: sha256; empty where it is not recorded) of data_source; beside them: rows that a merge's
    coefficients were chosen by."""

    data_source: str | None
    data_sha256: dict[str, str]
    num_samples: int
    seed: int | None
    beside: bool = False

    def reads(self, source: str, now: dict[str, str]) -> bool:
        """Whether these were rows of `source`, whose files are `now`."""
        if not self.data_sha256:
            return self.data_source == source
        return any(self.data_sha256.get(file) == digest for file, digest in now.items())

    def changed_file(self, now: dict[str, str]) -> str | None:
        """The first of its files whose content is another now: nobody knows which of its rows were drawn."""
        return next((file for file in sorted(now) if self.data_sha256.get(file, now[file]) != now[file]), None)


def drawn_by(*records: dict | None) -> list[Drawn]:
    """The training rows that runs, and all that they were made from, have seen, by their run.json (None: nothing is
    known of it)."""
    drawn = []
    for record in filter(None, records):
        meta = record["meta"]
        drawn.append(_drawn(record["run"]["arguments"]))
        if "drawn" in meta:
            drawn += [Drawn(**one) for one in meta["drawn"]]
        else:  # an earlier version's: of what it was made from, the arguments alone
            made_from = [*(meta.get("experts") or {}).values(), meta.get("fused"), meta.get("init")]
            drawn += [_drawn(arguments) for arguments in filter(None, made_from)]
    return [one for i, one in enumerate(drawn) if one is not None and one not in drawn[:i]]


def dealt_from(source: str) -> dict[str, str]:
    """The checksums of the files that data/split.py has dealt this folder from; {} for another folder."""
    made = None if source == "hub" else source_dir(source).parent / SPLIT_FILE
    return json.loads(made.read_text(encoding="utf-8"))["made_by"]["data_sha256"] if made and made.exists() else {}


def recorded(drawn: list[Drawn]) -> list[dict]:
    """As run.json has it under "drawn" of what a run was made from."""
    return [asdict(one) for one in drawn]


def _drawn(arguments: dict) -> Drawn | None:
    """The rows that a script drew itself: to train on, to start routers by, or to choose coefficients by."""
    read = arguments.get("data_source"), arguments.get("data_sha256") or {}
    if arguments.get("num_held_apart") is not None:
        return Drawn(*read, arguments["num_held_apart"], arguments.get("seed"), beside=True)
    if arguments.get("num_prompts") is not None:
        of_trained = arguments.get("num_trained")
        return Drawn(*read, -1 if of_trained is None else of_trained, arguments.get("seed"))
    if arguments.get("num_samples") is not None:
        return Drawn(*read, arguments["num_samples"], arguments.get("seed"))
    return None


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
