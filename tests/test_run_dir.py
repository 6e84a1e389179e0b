"""A run's folder: what may be taken again, what differs, and who writes it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from config import UserError
from workspace import run_dir

HOLD = """
import sys, time
from pathlib import Path
from workspace import run_dir
print(run_dir.begin(Path(sys.argv[1]), "a.py", {"batch": 1}, "move it"), flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    yield tmp_path / "outputs" / "safety"
    run_dir.release(tmp_path / "outputs" / "safety")


def begin(folder, **arguments):
    return run_dir.begin(folder, "a.py", arguments, "move it")


def test_a_begun_folder_without_work_is_taken_by_other_arguments(folder):
    assert begin(folder, batch=64) == "new"
    (folder / "runs").mkdir()  # TensorBoard's logs
    assert begin(folder, batch=8) == "new"
    assert json.loads((folder / "arguments.json").read_text())["run"]["arguments"] == {"batch": 8}
    (folder / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match="holds a run with batch=8, this one has batch=64; move it"):
        begin(folder, batch=64)
    assert begin(folder, batch=8) == "resume"


def test_a_changed_data_file_is_named(folder):
    begin(folder, data_sha256={"a.jsonl": "1", "b.jsonl": "2"}, data_source="/one")
    run_dir.finish(folder, "a.py", {"data_sha256": {"a.jsonl": "1", "b.jsonl": "2"}, "data_source": "/one"}, {}, {})
    assert begin(folder, data_sha256={"a.jsonl": "1", "b.jsonl": "2"}, data_source="/moved") == "complete"
    with pytest.raises(UserError, match="the data file b.jsonl is not the one that this run has read; move it"):
        begin(folder, data_sha256={"a.jsonl": "1", "b.jsonl": "3"}, data_source="/one")


@pytest.mark.parametrize("name", [*run_dir.LATER_DIGESTS, "data_sha256"])
def test_a_digest_that_an_earlier_version_did_not_record_is_not_asked_for(folder, name):
    for nothing in ({}, {name: None}, {name: {}}):
        folder.mkdir(parents=True, exist_ok=True)
        run_dir.finish(folder, "a.py", {"x": 1, **nothing}, {}, {})
        assert begin(folder, x=1, **{name: {"a": "1"}}) == "complete"


def test_a_base_is_compared_by_its_digest_and_an_earlier_record_by_its_place(folder):
    begin(folder, base_model="/one", base_sha256="1", x=1)
    (folder / "outputs.jsonl").write_text("")
    assert begin(folder, base_model="/two", base_sha256="1", x=1) == "resume"
    with pytest.raises(UserError, match="base_sha256=1, this one has base_sha256=2"):
        begin(folder, base_model="/one", base_sha256="2", x=1)
    earlier = {"run": {"script": "a.py", "arguments": {"base_model": "/one", "x": 1}}}
    (folder / "arguments.json").write_text(json.dumps(earlier))
    assert begin(folder, base_model="/one", base_sha256="1", x=1) == "resume"
    with pytest.raises(UserError, match="base_model=/one, this one has base_model=/two"):
        begin(folder, base_model="/two", base_sha256="1", x=1)


def test_the_current_folder_is_a_folder_like_others(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert begin(Path(".")) == "new" and (tmp_path / "here.lock").exists()
    run_dir.release(tmp_path / "here")
    with run_dir.open_partial(Path(".")) as partial:
        assert partial == tmp_path / "here.partial"


def test_a_second_process_is_told_who_holds_the_folder(folder):
    """A real process; its end, even by a kill, lets the folder go. Nothing of the lock lies in the folder."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "new\n"
        with pytest.raises(UserError, match=f"safety: is being written by process {holder.pid} on .*, since 20"):
            begin(folder, batch=1)
        assert [path.name for path in folder.iterdir()] == ["arguments.json"]
        assert {path.name for path in folder.parent.iterdir()} == {"safety", "safety.lock", "safety.lock.json"}
    finally:
        holder.kill()
        holder.wait()
    (folder / "checkpoint-1").mkdir()
    assert begin(folder, batch=1) == "resume"


def test_a_finished_folder_is_let_go(folder):
    begin(folder, batch=1)
    run_dir.finish(folder, "a.py", {"batch": 1}, {}, {})
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "complete\n"
    finally:
        holder.kill()
        holder.wait()
