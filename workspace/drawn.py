"""Which training rows a run has seen, itself or by what it was made from: what its run.json says under "drawn"."""

from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.files import as_written
from workspace.run_dir import read_run


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

    @classmethod
    def of(cls, recorded: dict) -> "Drawn":
        """As run.json has it. TypeError for another form."""
        one = cls(**recorded)
        if not isinstance(one.data_sha256, dict) or not isinstance(one.num_samples, int):
            raise TypeError("drawn: data_sha256 is an object, and num_samples a number")
        return one

    def reads(self, source: str, now: dict[str, str]) -> bool:
        """Whether these were rows of `source`, whose files are `now`."""
        if not self.data_sha256:
            return self.data_source == source
        return any(self.data_sha256.get(file) == digest for file, digest in now.items())

    def changed_file(self, now: dict[str, str]) -> str | None:
        """The first of its files whose content is another now: nobody knows which of its rows were drawn."""
        return next((file for file in sorted(now) if self.data_sha256.get(file, now[file]) != now[file]), None)


def drawn_by(*folders: Path) -> list[Drawn]:
    """The training rows that runs, and all that they were made from, have seen, by their run.json (of a folder without
    one nothing is known). UserError for a run.json that has not their form."""
    drawn = []
    for folder in folders:
        if record := read_run(folder):
            with as_written(folder):
                drawn += _drawn_by_run(record["run"]["arguments"], record["meta"])
    return [one for i, one in enumerate(drawn) if one is not None and one not in drawn[:i]]


def _drawn_by_run(arguments: dict, meta: dict) -> list[Drawn | None]:
    if "drawn" in meta:
        return [_drawn(arguments), *(Drawn.of(one) for one in meta["drawn"])]
    # an earlier version's: of what it was made from, the arguments alone
    made_from = [*(meta.get("experts") or {}).values(), meta.get("fused"), meta.get("init")]
    return [_drawn(arguments), *(_drawn(one) for one in filter(None, made_from))]


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
