"""The three sources of rows, the records made of them, and what is said of bad files."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import SHARED_DATA, run_script, write_jsonl

from config import TASKS, UserError
from data import sources
from data.sources import Record, answer_records, draw, prompt_records, read_rows, spread

CATEGORIES = {  # BeaverTails' 14
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
}
PROMPT = {"helpfulness": "instruction", "safety": "prompt", "truthfulness": "question"}


def helpful(id="h", instruction="Name a river.", input="", output="The Rhine."):
    return {"id": id, "instruction": instruction, "input": input, "output": output}


def safety(id="s", prompt="How?", response="No.", is_safe=True, category=()):
    return {"id": id, "prompt": prompt, "response": response, "is_safe": is_safe, "category": list(category)}


def question(id="t", question="Why?", best="b", correct=("b", "c"), incorrect=("w", "x")):
    answers = {"correct_answers": list(correct), "incorrect_answers": list(incorrect)}
    return {"id": id, "question": question, "best_answer": best, **answers}


def targets(choices, labels):
    return {"choices": choices, "labels": labels}


def plain(comparisons):
    return [(c.id, c.choices, c.labels) for c in comparisons]


def without_id(row):
    return {key: value for key, value in row.items() if key != "id"}


GOOD = {"helpfulness": helpful(), "safety": safety(), "truthfulness": question()}


# ---- folder and sample -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_folder_rows_come_in_order_with_every_column(task, tmp_path):
    rows = [{**GOOD[task], "id": id, "extra": "é\u2028\x85"} for id in ("z", "a", "m")]  # no line ends in JSON lines
    path = write_jsonl(tmp_path / f"{task}_test.jsonl", rows)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert read_rows(task, "test", str(tmp_path)) == rows
    assert sources.source_files(task, "test", str(tmp_path)) == [path]


@pytest.mark.parametrize("task", TASKS)
def test_sample_is_large_enough_and_its_halves_are_disjoint(task):
    train, test = (read_rows(task, split, "sample") for split in ("train", "test"))
    assert all(set(GOOD[task]) <= set(row) for row in train + test)
    assert len({row["id"] for row in train + test}) == len(train) + len(test)
    prompts = [{row[PROMPT[task]].strip().lower() for row in rows} for rows in (train, test)]
    assert len(prompts[0]) >= 150 and len(prompts[1]) >= 50
    assert not prompts[0] & prompts[1]
    assert len(prompt_records(task, test, "sample")) == len(prompts[1])
    assert len(answer_records(task, train)) >= 150


@pytest.mark.parametrize("split", ["train", "test"])
def test_sample_has_every_category_and_is_consistent(split):
    rows = read_rows("safety", split, "sample")
    assert {name for row in rows for name in row["category"]} == CATEGORIES and len(CATEGORIES) == 14
    assert all(bool(row["category"]) != row["is_safe"] for row in rows)
    safe, unsafe = ({row["prompt"] for row in rows if row["is_safe"] == value} for value in (True, False))
    assert unsafe and unsafe <= safe
    for row in read_rows("truthfulness", split, "sample"):
        assert row["best_answer"] in row["correct_answers"]
        assert not set(row["correct_answers"]) & set(row["incorrect_answers"])


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"the public data sets' slices are not at {SHARED_DATA}")
def test_slices_of_the_public_data():
    folder = str(SHARED_DATA)
    counts = [len(read_rows(task, split, folder)) for task in TASKS for split in ("train", "test")]
    assert counts == [2000, 405, 2979, 400, 408, 409]
    trained = {row["prompt"] for row in read_rows("safety", "train", folder)}
    assert not trained & {row["prompt"] for row in read_rows("safety", "test", folder)}
    assert sum(row["id"].startswith("bt30k_test-") for row in read_rows("safety", "train", folder)) == 2184
    pairs = [json.loads(line) for line in (SHARED_DATA / "safety_pairs.jsonl").read_text("utf-8").strip().split("\n")]
    kept = [(p["id"], (p["safe"], p["unsafe"]), (1, 0)) for p in pairs if p["prompt"] not in trained]
    assert len(pairs) == 2000 > len(kept) > 0
    assert plain(sources.safety_comparisons("test", folder)) == kept
    mc1, mc2 = sources.truthfulness_comparisons("test", folder)
    assert [c.id for c in mc1] == [c.id for c in mc2] == [f"truthfulqa-{i}" for i in range(408, 817)]
    assert all(sum(c.labels) == 1 for c in mc1) and sum(sum(c.labels) for c in mc2) > 409


# ---- hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> None:
    """Local folders laid out as the hub's repositories, where `datasets` takes them for those."""
    import datasets

    def publish(repository: str, rows_of: dict[str, dict[str, list[dict]]]):  # of each configuration and split
        configs = [
            {"config_name": name, "data_files": [{"split": split, "path": f"{name}-{split}.jsonl"} for split in splits]}
            for name, splits in rows_of.items()
        ]
        for config in configs:
            for file in config["data_files"]:
                rows = [without_id(row) for row in rows_of[config["config_name"]][file["split"]]]
                write_jsonl(tmp_path / repository / file["path"], rows)
        (tmp_path / repository / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")

    def beaver_tails(number):  # two answers to the first prompt, the first of them unsafe
        names = [{name: n == 0 and name[:3] == "ani" for name in sorted(CATEGORIES)} for n in range(number)]
        return [{**safety("", f"Q{max(n - 1, 0)}", f"A{n}", n != 0), "category": names[n]} for n in range(number)]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    alpaca = [{**helpful(instruction=f"Do {i}."), "text": "..."} for i in range(40)]
    publish("tatsu-lab/alpaca", {"default": {"train": alpaca}})
    publish("PKU-Alignment/BeaverTails", {"default": {"30k_train": beaver_tails(4), "30k_test": beaver_tails(511)}})
    mc = [
        {
            "question": "?",
            "mc1_targets": targets([f"b{i}", "w"], [1, 0]),
            "mc2_targets": targets(["c", f"b{i}", "w"], [1, 1, 0]),
        }
        for i in range(412)
    ]
    questions = [question(best=f"b{i}") for i in range(412)]
    publish(
        "Paul/XSTest",
        {
            "default": {
                "train": [
                    {"prompt": f"X{i}", "type": "homonyms", "label": label}
                    for i, label in enumerate(("safe", "unsafe"))
                ]
            }
        },
    )
    publish("truthfulqa/truthful_qa", {"generation": {"validation": questions}, "multiple_choice": {"validation": mc}})


def test_hub_alpaca_is_a_fixed_sample_with_ids(hub, monkeypatch):
    everything = read_rows("helpfulness", "train", "hub")
    assert [(row["id"], row["instruction"]) for row in everything] == [(f"alpaca-{i}", f"Do {i}.") for i in range(40)]
    assert sources.NUM_ALPACA == 20_000
    monkeypatch.setattr(sources, "NUM_ALPACA", 10)
    drawn = read_rows("helpfulness", "train", "hub")
    assert drawn == [row for row in everything if row in drawn] and len(drawn) == 10
    assert drawn == read_rows("helpfulness", "train", "hub") != everything[:10]


def test_hub_beavertails(hub):
    train = read_rows("safety", "train", "hub")
    assert [row["id"] for row in train] == [f"bt30k_train-{i}" for i in range(4)]
    assert [row["category"] for row in train] == [["animal_abuse"], [], [], []]
    test = read_rows("safety", "test", "hub")
    prompts = prompt_records("safety", test, "hub")
    assert (len(test), len(prompt_records("safety", test, "sample"))) == (511, 510)
    assert [record.instruction for record in prompts] == [f"Q{i}" for i in range(500)]  # the paper scores the first 500
    assert plain(sources.safety_comparisons("test", "hub")) == [("bt30k_test-0", ("A1", "A0"), (1, 0))]


def test_hub_xstest(hub):
    rows = read_rows("xstest", "test", "hub")
    records = prompt_records("xstest", rows, "hub")
    assert [(r.id, r.instruction, r.output) for r in records] == [
        ("xstest-0", "X0", "safe"),
        ("xstest-1", "X1", "unsafe"),
    ]


def test_xstest_labels_are_safe_and_unsafe(tmp_path):
    rows = [{"id": "1", "prompt": "How?", "type": "homonyms", "label": "fine"}]
    write_jsonl(tmp_path / "xstest.jsonl", rows)
    with pytest.raises(UserError, match="id '1' has label 'fine'; the labels are safe and unsafe"):
        read_rows("xstest", "test", str(tmp_path))


def test_hub_truthfulqa_is_halved_in_its_order(hub):
    train, test = (read_rows("truthfulness", split, "hub") for split in ("train", "test"))
    assert [row["id"] for row in train] == [f"truthfulqa-{i}" for i in range(408)]
    assert [(row["id"], row["best_answer"]) for row in test] == [(f"truthfulqa-{i}", f"b{i}") for i in range(408, 412)]
    mc1, mc2 = map(plain, sources.truthfulness_comparisons("test", "hub"))
    assert mc1 == [(f"truthfulqa-{i}", (f"b{i}", "w"), (1, 0)) for i in range(408, 412)]
    assert mc2 == [(f"truthfulqa-{i}", ("c", f"b{i}", "w"), (1, 1, 0)) for i in range(408, 412)]
    assert len(sources.truthfulness_comparisons("train", "hub")[0]) == 408


READ_EVAL = "import json; from data import sources; print(json.dumps(sources.read_rows('helpfulness', 'test', 'hub')))"


def test_hub_alpaca_eval_is_read_from_the_hub_cache(tmp_path):
    repository = tmp_path / "datasets--tatsu-lab--alpaca_eval"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    rows = [{"instruction": f"Do {i}.", "output": "Did.", "generator": "g", "dataset": "d"} for i in range(3)]
    (snapshot / "alpaca_eval.json").write_text(json.dumps(rows))
    places = {name: str(tmp_path) for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HOME")}
    run = run_script("-c", READ_EVAL, **places)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [{"id": f"alpaca_eval-{i}", "input": "", **row} for i, row in enumerate(rows)]


def test_a_hub_that_cannot_be_reached_is_told_with_a_remedy(hub, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: json.loads("no\nroute"))
    with pytest.raises(UserError, match="PKU-Alignment/BeaverTails .*DecodeError.* --data_source sample") as raised:
        read_rows("safety", "train", "hub")
    assert len(str(raised.value).splitlines()) == 1


@pytest.fixture
def broken_hub():
    """A hub that is down: (its address, the requests that came in)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(503)

        do_HEAD = do_GET

        def log_message(self, *_):
            """The tests' output is theirs."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


READ_SAFETY = (
    "import cli; from data import sources; cli.command(lambda _: sources.read_rows('safety', 'train', 'hub'))()"
)


def test_a_data_set_that_cannot_be_had_is_asked_for_once_and_told_in_one_line(broken_hub, tmp_path):
    url, requests = broken_hub
    run = run_script("-c", READ_SAFETY, HF_HUB_OFFLINE="0", HF_ENDPOINT=url, HF_HOME=str(tmp_path))
    assert (run.returncode, len(run.stderr.splitlines())) == (2, 1), run.stderr
    assert "PKU-Alignment/BeaverTails" in run.stderr and "--data_source sample" in run.stderr
    assert sum("BeaverTails" in path for path in requests) == 1, requests  # the library by itself asks for 27 s


# ---- records and comparisons -----------------------------------------------------------------------------------------


def test_answer_records_are_every_good_answer():
    rows = [helpful("1", "I", "in", "out"), helpful("2", output="")]
    expected = [Record("1", "helpfulness", "I", "in", "out"), Record("2", "helpfulness", "Name a river.", "", "")]
    assert answer_records("helpfulness", rows) == expected
    rows = [safety("1", "p", "r"), safety("2", "p", "bad", False), safety("3", "p", "s")]
    assert answer_records("safety", rows) == [Record("1", "safety", "p", "", "r"), Record("3", "safety", "p", "", "s")]
    rows = [question("1", "q", "b", ("c", "b")), question("2", "r", "d", ("d",))]
    expected = [("1-0", "q", "c"), ("1-1", "q", "b"), ("2-0", "r", "d")]
    assert answer_records("truthfulness", rows) == [Record(i, "truthfulness", q, "", a) for i, q, a in expected]


def test_prompt_records_are_every_prompt_once_in_order():
    rows = [safety("1", "p", "bad", False), safety("2", "q", "bad", False), safety("3", "p", "first")]
    rows += [safety("4", "p", "second"), safety("5", "o", "only")]
    expected = [
        Record(*row)
        for row in (("1", "safety", "p", "", "first"), ("2", "safety", "q", "", ""), ("5", "safety", "o", "", "only"))
    ]
    assert prompt_records("safety", rows, "sample") == expected
    assert prompt_records("truthfulness", [question("1")], "hub") == [Record("1", "truthfulness", "Why?", "", "b")]
    expected = [Record("1", "helpfulness", "Name a river.", "x", "The Rhine.")]
    assert prompt_records("helpfulness", [helpful("1", input="x")], "hub") == expected


def test_safety_comparisons_from_pairs_less_the_trained_prompts_else_from_rows(tmp_path):
    rows = [
        safety("1", "p", "bad", False),
        safety("2", "q", "fine"),
        safety("3", "p", "good"),
        safety("4", "p", "worse", False),
        safety("5", "q", "finer"),
    ]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"safety_{split}.jsonl", [{**row, "prompt": row["prompt"] + split} for row in rows])
    assert plain(sources.safety_comparisons("test", str(tmp_path))) == [("1", ("good", "bad"), (1, 0))]
    pairs = [{"id": p, "prompt": p, "safe": "s", "unsafe": "u"} for p in ("ptrain", "new", "ptest", "qtrain")]
    write_jsonl(tmp_path / "safety_pairs.jsonl", pairs)
    assert plain(sources.safety_comparisons("test", str(tmp_path))) == [
        ("new", ("s", "u"), (1, 0)),
        ("ptest", ("s", "u"), (1, 0)),
    ]


def test_truthfulness_comparisons_from_the_published_targets_else_from_columns(tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"truthfulness_{split}.jsonl", [question(split)])

    def comparisons(split):
        return [plain(half) for half in sources.truthfulness_comparisons(split, str(tmp_path))]

    def built(id):
        return [[(id, ("b", "w", "x"), (1, 0, 0))], [(id, ("b", "c", "w", "x"), (1, 1, 0, 0))]]

    assert comparisons("test") == built("test")
    published = {"mc1_targets": targets(["n", "y"], [0, 1]), "mc2_targets": targets(["y", "z", "n"], [1, 1, 0])}
    row = {"idx": 408, "question": "?", **published}
    write_jsonl(tmp_path / "truthfulness_mc.jsonl", [row])
    id = "truthfulqa-408"
    assert comparisons("test") == [[(id, ("n", "y"), (0, 1))], [(id, ("y", "z", "n"), (1, 1, 0))]]
    assert comparisons("train") == built("train")  # the published targets are the test half's
    files = {path.name for path in sources.source_files("truthfulness", "test", str(tmp_path), comparisons=True)}
    assert "truthfulness_train.jsonl" not in files


def test_multiple_choice_questions_that_were_trained_on_are_not_scored(tmp_path):
    """The published file holds both halves."""
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"truthfulness_{split}.jsonl", [question(split) | {"question": split}])
    one = targets(["n", "y"], [0, 1])
    rows = [{"idx": i, "question": split, "mc1_targets": one, "mc2_targets": one}
            for i, split in enumerate(("train", "test"))]  # fmt: skip
    write_jsonl(tmp_path / "truthfulness_mc.jsonl", rows)
    for half in sources.truthfulness_comparisons("test", str(tmp_path)):
        assert [one.instruction for one in half] == ["test"]
    files = {path.name for path in sources.source_files("truthfulness", "test", str(tmp_path), comparisons=True)}
    assert "truthfulness_train.jsonl" in files  # which decides what is scored


def test_spread_and_draw():
    items = list("abcdefghij")
    assert spread(items, 5) == list("acegi") and spread(items, 3) == list("adg") and spread(items, 1) == ["a"]
    drawn = draw(items, 4, seed=1)
    assert drawn == sorted(drawn) and len(set(drawn)) == 4 and drawn == draw(items, 4, seed=1)
    assert len({tuple(draw(items, 4, seed)) for seed in range(20)}) > 10
    for number in (-1, 10, 11):
        assert spread(items, number) == draw(items, number, 1) == items


# ---- bad data --------------------------------------------------------------------------------------------------------


BAD = {
    "bad JSON": ("helpfulness", b'{"id": "2", ', "not JSON"),
    "wrong encoding": ("helpfulness", b'{"id": "2", "instruction": "caf\xe9"}', "not UTF-8"),
    "no object": ("safety", b'["id", "2"]', "must be a JSON object, is a list"),
    "missing": ("safety", {"prompt": None}, "field 'prompt' is missing"),
    "no id": ("truthfulness", {"id": None}, "field 'id' is missing"),
    "id is a number": ("helpfulness", {"id": 2}, "field 'id' must be a str, is 2"),
    "empty id": ("helpfulness", {"id": " "}, "field 'id' is empty"),
    "same id": ("helpfulness", {"id": "1"}, "id '1' was already given on line 1"),
    "mistyped": ("helpfulness", {"input": 3}, "field 'input' must be a str, is 3"),
    "label as a number": ("safety", {"is_safe": 1}, "field 'is_safe' must be a bool, is 1"),
    "answer for answers": ("truthfulness", {"correct_answers": "b"}, "field 'correct_answers' must be a list"),
    "empty output": ("helpfulness", {"output": ""}, "field 'output' is empty"),
    "blank response": ("safety", {"response": " \n"}, "field 'response' is empty"),
    "empty best answer": ("truthfulness", {"best_answer": ""}, "field 'best_answer' is empty"),
    "no answers": ("truthfulness", {"incorrect_answers": []}, "field 'incorrect_answers' is empty"),
    "empty in a list": ("truthfulness", {"correct_answers": ["b", ""]}, "field 'correct_answers' must hold non-empty"),
    "number in a list": ("safety", {"category": [1]}, "field 'category' must hold non-empty strings"),
}


@pytest.mark.parametrize(("task", "change", "told"), BAD.values(), ids=BAD)
def test_a_bad_row_is_told_with_file_line_and_field(task, change, told, tmp_path):
    line = change
    if isinstance(change, dict):
        row = {**GOOD[task], "id": "2", **change}
        line = json.dumps({key: value for key, value in row.items() if value is not None}).encode()
    path = tmp_path / f"{task}_train.jsonl"
    path.write_bytes(json.dumps({**GOOD[task], "id": "1"}).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError) as raised:
        read_rows(task, "train", str(tmp_path))
    message = str(raised.value)
    assert message.startswith(f"{path}:3: ") and told in message and len(message.splitlines()) == 1


BAD_TARGETS = [[], {}, {"choices": ["a"]}, targets("ab", [1, 0]), targets(["a", ""], [1, 0])]
BAD_TARGETS += [targets(["a", "b"], labels) for labels in ([1], [1, 0, 0], [1, 1], [1, 2])]


@pytest.mark.parametrize("bad", BAD_TARGETS, ids=str)
def test_bad_multiple_choice_targets_are_told(bad, tmp_path):
    good = {"idx": 1, "question": "?", "mc1_targets": targets(["a", "b"], [1, 0]), "mc2_targets": bad}
    path = write_jsonl(tmp_path / "truthfulness_mc.jsonl", [good])
    with pytest.raises(UserError, match=f"{path}:1: field 'mc2_targets'"):
        sources.truthfulness_comparisons("test", str(tmp_path))


def test_an_answer_may_be_empty_where_it_is_a_reference(tmp_path):
    write_jsonl(tmp_path / "helpfulness_test.jsonl", [helpful(output="")])
    assert read_rows("helpfulness", "test", str(tmp_path))[0]["output"] == ""


def test_missing_files_and_unknown_names(tmp_path):
    (tmp_path / "safety_test.jsonl").write_text("\n \n")
    for task, split, source, told in (
        ("safety", "train", tmp_path, f"{tmp_path}/safety_train.jsonl: cannot be read"),
        ("safety", "test", tmp_path, f"{tmp_path}/safety_test.jsonl: has no rows"),
        ("honesty", "test", "sample", "unknown task 'honesty': it is none of helpfulness, safety, truthfulness, and "),
        ("safety", "test", tmp_path / "none", f"--data_source {tmp_path}/none: must be hub, sample, or a folder"),
    ):
        with pytest.raises(UserError) as raised:
            read_rows(task, split, str(source))
        assert str(raised.value).startswith(told) and len(str(raised.value).splitlines()) == 1
