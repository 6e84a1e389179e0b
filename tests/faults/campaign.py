"""Strike every stage with faults until each has been struck often enough, and print what came of it as a table.

python tests/faults/campaign.py --kills 50        goes on from results/faults/campaign.json; make faults
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from fake_server import FakeServer
from tqdm import tqdm

from config import RESULTS_DIR, ROOT
from faults import stages
from faults.kills import Killer, Tally, fork_server
from workspace.files import write_json


def table(tallies: dict[str, dict]) -> str:
    """The tallies as a markdown table."""
    lines = ["| fault | times | work lost | wrong results | left behind |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {name} | {t['times']} | {t['lost']} | {t['wrong']} | {t['left']} |" for name, t in tallies.items()]
    return "\n".join(lines)


def kill_stages(folder: Path, kills: int, only: str, tallies: dict[str, dict], keep) -> None:
    """Kill each stage until it was killed `kills` times in all."""
    from scripts import MAINS

    with FakeServer(stages.answer) as server:
        pipeline = stages.Pipeline(folder, ROOT, server)
        pipeline.make_ready(MAINS)
        killer = Killer(fork_server(), pipeline.ready, folder)
        for stage in pipeline.stages():
            name = f"killed: {stage.name}"
            tally = Tally(**tallies.get(name, {}))
            if only not in name or tally.times >= kills:
                continue
            expected, seconds, changes = killer.undisturbed(stage)
            assert killer.undisturbed(stage)[0] == expected, f"{stage.name}: two undisturbed runs differ"
            with tqdm(total=kills, initial=tally.times, desc=name, unit="kill") as bar:
                while tally.times < kills:
                    one = killer.killed(stage, expected, seconds, changes, f"{name} {tally.lives}")
                    for what in ("times", "lives", "lost", "wrong", "left", "examples"):
                        setattr(tally, what, getattr(tally, what) + getattr(one, what))
                    tallies[name] = asdict(tally)
                    keep()
                    bar.update(one.times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kills of each stage (default: 50)")
    parser.add_argument("--only", default="", help="strike the stages only whose name has this in it")
    parser.add_argument(
        "--folder", type=Path, default=RESULTS_DIR / "faults", help="where it works and keeps its counts"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    kept = args.folder / "campaign.json"
    tallies = json.loads(kept.read_text()) if kept.exists() else {}
    kill_stages(args.folder, args.kills, args.only, tallies, lambda: write_json(kept, tallies))
    print(table(tallies))
    for name, tally in tallies.items():
        for example in tally["examples"]:
            print(f"{name}: {example}", file=sys.stderr)
    sys.exit(any(tally["lost"] or tally["wrong"] or tally["left"] for tally in tallies.values()))


if __name__ == "__main__":
    main()
