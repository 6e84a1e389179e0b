"""Strike every stage with faults until each has been struck often enough, and print what came of it as a table.

python tests/faults/campaign.py --kills 50        goes on from results/faults/campaign.json; make faults
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from fake_server import FakeServer
from tqdm import tqdm

from config import RESULTS_DIR, ROOT
from faults import stages
from faults.damage import Faults
from faults.kills import Killer, Tally, fork_server
from workspace.files import write_json


def table(tallies: dict[str, Tally]) -> str:
    """The tallies as a markdown table."""
    lines = ["| fault | times | work lost | wrong results | left behind |", "| --- | --- | --- | --- | --- |"]
    for name, tally in tallies.items():
        counts = tally.times, tally.lost, tally.wrong, tally.left
        lines.append(
            f"| {name} | " + " | ".join(map(str, (tally.unavailable,) if tally.unavailable else counts)) + " |"
        )
    return "\n".join(lines)


class Campaign:
    """Counts of faults, kept after each. only: what of a fault's name must be there."""

    def __init__(self, folder: Path, only: str):
        self.only, self.kept = only, folder / "campaign.json"
        kept = json.loads(self.kept.read_text()) if self.kept.exists() else {}
        self.tallies = {name: Tally(**one) for name, one in kept.items()}

    def strike(self, name: str, times: int, unit: str, once: Callable[[Tally], Tally]) -> None:
        """Add what `once` gives, of the count so far, until a fault has struck that often."""
        tally = self.tallies.get(name, Tally())
        if self.only not in name or tally.times >= times or tally.unavailable:
            return
        with tqdm(total=times, initial=tally.times, desc=name, unit=unit) as bar:
            while tally.times < times and not tally.unavailable:
                one = once(tally)
                bar.update(one.times)
                tally.add(one)
                self.tallies[name] = tally
                write_json(self.kept, {name: asdict(one) for name, one in self.tallies.items()})

    def run(self, folder: Path, kills: int, times: int) -> None:
        from scripts import MAINS

        with FakeServer(stages.answer) as server:
            pipeline = stages.Pipeline(folder, ROOT, server)
            pipeline.make_ready(MAINS)
            killer = Killer(fork_server(), pipeline.ready, folder)
            faults = Faults(pipeline, killer)
            for stage in pipeline.stages():
                name = f"killed: {stage.name}"
                self.strike(name, kills, "kill", lambda tally, stage=stage: faults.killed(stage, tally.lives))
            for name, fault in faults.all().items():
                self.strike(name, times, "fault", lambda tally, fault=fault: fault(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kills of each stage (default: 50)")
    parser.add_argument("--times", type=int, default=20, help="times that every other fault strikes (default: 20)")
    parser.add_argument("--only", default="", help="strike the stages only whose name has this in it")
    parser.add_argument(
        "--folder", type=Path, default=RESULTS_DIR / "faults", help="where it works and keeps its counts"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(args.folder, args.only)
    campaign.run(args.folder, args.kills, args.times)
    print(table(campaign.tallies))
    for name, tally in campaign.tallies.items():
        for example in tally.examples:
            print(f"{name}: {example}", file=sys.stderr)
    sys.exit(any(tally.lost or tally.wrong or tally.left for tally in campaign.tallies.values()))


if __name__ == "__main__":
    main()
