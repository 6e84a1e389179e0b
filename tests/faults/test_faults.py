"""The campaign's short form: each stage killed in one life of it, each other fault once. `make faults` does more."""

import json
import multiprocessing
from dataclasses import replace

import pytest
from fake_server import FakeServer
from scripts import MAINS

from config import ROOT
from evaluator.judges.cache import JudgementCache, cache_path
from faults import stages
from faults.campaign import Campaign, table
from faults.damage import Faults, leave_journal
from faults.kills import Killer, Tally, fork_server, kill
from faults.trees import content, lost_work, rows_of

pytestmark = pytest.mark.slow
STAGES = (
    "expert training", "fusing", "fusing by prompts", "fusion training", "merging", "merging, tuned", "inference",
    "inference by a server", "likelihood", "judge training", "judging", "judging by a server", "selecting",
    "export to shared", "export to by-name", "export to mixtral", "export to qwen3_moe", "export to peft",
    "export to pt", "report", "comparison",
)  # fmt: skip
OTHERS = (
    "a checkpoint's files cut short", "a run's weights cut short", "answers cut within a character",
    "a database left in a transaction", "a disk that fills", "a folder that may only be read",
    "a folder that vanishes", "a clock that jumps back", "killed for its memory", "a loss that is not finite",
    "two processes at once", "ten processes at once", "a server that fails", "a judge's server that fails",
)  # fmt: skip


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with FakeServer(stages.answer) as server:
        pipeline = stages.Pipeline(folder, ROOT, server)
        pipeline.make_ready(MAINS)
        yield Faults(pipeline, Killer(fork_server(), pipeline.ready, folder))


def check(tally: Tally) -> None:
    if tally.unavailable:
        pytest.skip(tally.unavailable)
    assert (tally.lost, tally.wrong, tally.left) == (0, 0, 0), tally.examples


def test_the_campaign_strikes_all_of_these(faults):
    assert tuple(faults.stage) == STAGES and tuple(faults.by_name()) == OTHERS


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_ends_as_an_undisturbed_one(faults, name):
    stage = faults.stage[name]
    if name == "comparison":  # with fewer rows than the campaign's
        stage = replace(stage, flags=(*stage.flags, "--other_merges", 0, "--answers", 0))
    check(faults.killed(stage, 0))


@pytest.mark.parametrize("name", OTHERS)
def test_a_fault_loses_nothing(faults, name):
    tally = faults.all()[name](1)
    check(tally)
    assert tally.times


def test_what_has_ended_by_itself_is_not_killed():
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()
    kill(process)
    assert process.exitcode == 0


def test_counts_are_kept_and_added_to(tmp_path):
    campaign = Campaign(tmp_path, "")
    campaign.strike("a fault", 5, "fault", lambda tally: Tally(times=2, lost=1))
    again = Campaign(tmp_path, "")
    assert (again.tallies["a fault"].times, again.tallies["a fault"].lost) == (6, 3)
    again.strike("a fault", 5, "fault", lambda tally: pytest.fail("often enough"))
    assert "| a fault | 6 | 3 | 0 | 0 |" in table(again.tallies)


def test_what_is_lost_or_differs_is_seen(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"x": 1, "seconds": 2}))
    same, other = {"x": 1, "seconds": 9}, {"x": 2, "seconds": 2}
    (tmp_path / "b.json").write_text(json.dumps(same))
    (tmp_path / "c.json").write_text(json.dumps(other))
    assert content(tmp_path / "a.json") == content(tmp_path / "b.json") != content(tmp_path / "c.json")
    rows = {("row", str(i)) for i in range(5)}
    assert lost_work(rows, rows) == 0 and lost_work(rows, set()) == 5 and lost_work(rows, set(), 3) == 1
    early, late = ("checkpoint", "run", 2), ("checkpoint", "run", 4)
    assert lost_work({early}, {late}) == 0 and lost_work({late}, {early}) == 1


def test_judgements_under_a_journal_are_seen_and_left_alone(tmp_path):
    cache = JudgementCache(tmp_path)
    for number in range(200):
        cache.put("judge", "1", f"text {number}", "x" * 100)
    cache.connection.close()
    database = cache_path(tmp_path)
    before = rows_of(database)
    assert len(before) == 200 and leave_journal(database) and rows_of(database) == before
    assert database.with_name("judgements.sqlite-journal").exists()
