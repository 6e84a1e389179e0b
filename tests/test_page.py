"""The page of a comparison: its sections, what it escapes and leaves out, and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from copy import deepcopy

import pytest
from comparison_runs import FUSED, call, results, row_of, table, write_report, write_verdicts
from conftest import ROOT

from config import TASKS
from evaluator import comparison, report
from evaluator.metrics import MEAN_NLL, SHARES
from evaluator.page import write_page
from evaluator.page_answers import side_by_side
from evaluator.page_sections import Section, section_of
from evaluator.page_table import relative_gains, score_cell
from evaluator.page_words import setting_text, verdict
from evaluator.results_folder import read_run_scores

__all__ = ["results", "table"]  # fixtures


def test_the_same_rows_on_another_base_stand_beside_these(results, tmp_path, capsys):
    """Of a folder of kept rows; a row that it lacks is left out, the reference may not be."""
    kept, page = tmp_path / "kept", results / "report" / "index.html"
    call(report, "--runs", f"raw,safety,{FUSED}", "--save", kept, "--only_save", 1, "--results_dir", results)
    for path in kept.glob("*.json"):
        path.write_text(path.read_text().replace('"base_model": "tiny-llama"', '"base_model": "another"'))
    shown = ["--runs", f"raw,safety,truthfulness,{FUSED}", "--beside", kept, "--results_dir", results]
    call(report, *shown)
    section = page.read_text().split("The same rows on another base</h2>")[1].split("<h2>")[0]
    assert re.findall(r'scope="row">([^<]+)<', section) == ["raw", "safety", FUSED]
    numbers = json.loads((results / "report" / "table.json").read_text())
    value = row_of(numbers, "safety")["metrics"]["mean_nll_per_token"]["value"]
    assert section.count(f"{value:.3f} [") == 2 and section.count("p = ") == 4 and "Base model another" in section
    (kept / f"{FUSED}.json").unlink()
    with pytest.raises(SystemExit):
        call(report, *shown)
    assert f"has no {FUSED}.json" in capsys.readouterr().err


def test_other_comparisons_are_sections_of_the_page(results, table, tmp_path):
    """The best row first; what selects among answers has no likelihood and is left out. What a section draws is not
    missing."""
    runs = {name: read_run_scores(results, name, "test", None) for name in ("raw", "safety", FUSED)}
    compared = comparison.compare(runs, "safety")
    drawn = {"heading": "Sweep over k", "svg": "<svg></svg>", "caption": "Fusions & <others>."}
    more = Section("More", "Said <so>.", compared, (drawn,))
    write_page(tmp_path / "page.html", comparison.compare(runs, FUSED), runs, None, None, others=(more,))
    page = (tmp_path / "page.html").read_text()
    section = page.split("More</h2>")[1].split("<h2>")[0]
    assert "<h3>Sweep over k</h3>\n<figure><svg></svg><figcaption>Fusions &amp; &lt;others&gt;." in section
    missing = page.split("What is missing</h2>")[1]
    assert "Sweep over λ: no runs here to draw it from." in missing and "Sweep over k" not in missing
    value = {row["run"]: row["metrics"]["mean_nll_per_token"]["value"] for row in compared["rows"]}
    assert re.findall(r'scope="row">([^<]+)<', section) == sorted(value, key=value.get)
    assert "Said &lt;so&gt;." in section and section.count("below: safety − run, paired") == 1 + len(TASKS)
    assert all(f"{one:.3f} [" in section for one in value.values()) and section.count("p = ") == 2 * (1 + len(TASKS))
    only = {**table, "rows": [row for row in table["rows"] if row["run"] in ("consensus", FUSED)]}
    only["rows"] = [{**row, "metrics": {k: v for k, v in row["metrics"].items() if v}} for row in only["rows"]]
    assert [row["run"] for row in section_of(Section("", "", only))["rows"]] == [FUSED]


def test_a_section_shows_the_scores_that_it_names(table):
    """The best row by the first of them on top, each heading with its direction."""
    named = tuple(one for one in SHARES if one.name in ("safe_preferred", "mc1"))
    shown = section_of(Section("", "", table, scores=named))
    assert shown["columns"] == ["safe preferred ↑", "MC1 ↑"]
    values = [row_of(table, row["run"])["metrics"]["safe_preferred"]["value"] for row in shown["rows"]]
    assert values == sorted(values, reverse=True) and len(values) > 2


@pytest.mark.parametrize(("end", "tone"), [(-0.0002, "good"), (0.0002, "")])
def test_a_difference_whose_interval_holds_0_has_no_colour(table, end, tone):
    difference = {"difference": -0.013, "interval": [-0.022, end], "p_holm": 0.03}
    row = row_of(table, "raw") | {"paired": {MEAN_NLL.name: difference}}
    assert score_cell(row, [row], MEAN_NLL)["tone"] == tone


def test_a_section_shows_what_each_seed_comes_to(results, tmp_path):
    """As the main table does."""
    names = ("mixed", "mixed_seed_43", FUSED)
    runs = {name: read_run_scores(results, name, "test", None) for name in names}
    compared = comparison.compare(runs, FUSED)
    write_page(tmp_path / "page.html", compared, runs, None, None, others=(Section("More", "", compared),))
    section = (tmp_path / "page.html").read_text().split("More</h2>")[1].split("<h2>")[0]
    low, high = sorted(row_of(compared, "mixed")["metrics"]["mean_nll_per_token"]["of_seeds"])
    assert f"seeds {low:.3f} to {high:.3f}" in section


def test_the_setting_tells_which_questions_are_of_which_data(results):
    """Experts from elsewhere were trained on other questions than what joins them."""
    runs = {name: read_run_scores(results, name, "test") for name in ("raw", "safety", "merge_linear", FUSED)}
    records = {name: run.record for name, run in runs.items()}
    assert "; data sample, 8 training questions per task; made on " in setting_text(records, True)
    records[FUSED] = deepcopy(records[FUSED])
    records[FUSED]["run"]["arguments"] |= {"data_source": "/data/mixed_10", "num_samples": -1}
    said = (
        "; data sample, 8 training questions per task, and of the folder “mixed_10”, all training questions per task; "
    )
    assert said in setting_text(records, True)
    for record in (records["safety"], records[FUSED]):
        record["run"]["script"] = "merging.py"
    assert "; data sample, an unrecorded number of training questions per task; " in setting_text(records, True)


def test_a_gain_in_percent_is_of_the_seeds_that_both_have():
    score = {"value": 3.0, "seeds": [42, 43], "of_seeds": [2.0, 4.0]}
    paired = {"difference": -0.5, "interval": [-0.6, -0.4], "seeds": [42]}
    row = {"run": "safety", "kind": "expert", "metrics": {MEAN_NLL.name: score}, "paired": {MEAN_NLL.name: paired}}
    (gain,) = relative_gains({"rows": [row]})
    assert [gain["gain"], *gain["interval"]] == pytest.approx([25, 20, 30])


def test_more_experts_than_colours(results, tmp_path):
    runs = {name: read_run_scores(results, name, "test", None) for name in ("raw", FUSED)}
    experts = [f"expert {i}" for i in range(9)]
    tokens = [{"text": "yes", "expert": 8, "weight": 1.0}]
    answers = {"task": "safety", "question": "?", "experts": experts, "tokens": tokens}
    shown = {"data": "data", "side_by_side": [], "tinted": [answers]}
    write_page(tmp_path / "page.html", comparison.compare(runs, FUSED), runs, shown, None)
    assert 'title="expert 8, 1.00">yes' in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_answers_are_kept_for_others_only_where_they_are_to_be_shown(results, table, tmp_path, capsys):
    results, kept, other = shutil.copytree(results, tmp_path / "results"), tmp_path / "kept", tmp_path / "other"
    runs = ["--runs", ",".join(["raw", *TASKS, FUSED])]
    call(report, *runs, "--show_answers", results, "--save", kept, "--results_dir", results)
    page = (results / "report" / "index.html").read_text()
    shown = page[page.index("Which expert served") : page.index("What is missing")]
    assert "Answers side by side" in shown and "The prompts are those of sample." in shown
    call(report, *runs, "--saved", kept, "--results_dir", other)
    assert shown in (other / "report" / "index.html").read_text()
    (kept / "shown_answers.json").unlink()
    call(report, *runs, "--saved", kept, "--results_dir", other)
    assert "Answers side by side" not in (other / "report" / "index.html").read_text()
    for refused, said in (
        (["--save", kept, "--only_save", 1, "--show_answers", results], "leave --show_answers out"),
        (["--saved", kept, "--show_answers", kept], "holds no answers that two of --runs gave"),
    ):
        with pytest.raises(SystemExit):
            call(report, *runs, *refused, "--results_dir", other)
        assert said in capsys.readouterr().err


def test_the_page_stands_by_itself_and_says_what_the_table_says(results, table):
    write_report(results)
    page = (results / "report" / "index.html").read_text()
    assert (
        not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page) and "@import" not in page and "url(http" not in page
    )
    for row in table["rows"]:
        for name in ("mean_nll_per_token", "mc1"):
            if row["metrics"].get(name):
                assert f"{row['metrics'][name]['value']:.3f}" in page
    assert verdict(table) in html.unescape(page)
    assert page.count("<svg") == page.count('role="img" aria-label=') >= 4
    assert "Which expert served which token" in page and page.count('class="token"') > 10
    gain = page.split("<th>the paper</th>")[1].split("</table>")[0]
    expert, merged = (min(row["metrics"]["mean_nll_per_token"]["value"] for row in table["rows"] if row["kind"] == kind)
                      for kind in ("expert", "merge"))  # fmt: skip
    ours = row_of(table, FUSED)["metrics"]["mean_nll_per_token"]["value"]
    for theirs, paper in ((expert, 11.37), (merged, 6.18)):
        assert f"{100 * (theirs - ours) / theirs:+.2f} %" in gain and f"+{paper} %" in gain
    assert "No run has flagged." in page and "Answers side by side" in page
    assert f"<pre>python models/merging.py --method iso_c --results_dir {results}</pre>" in page
    assert "ensemble.py, its command not recorded, with" in page and "λ of the gating loss" in page


def test_what_a_model_wrote_is_escaped_on_the_page(results, table):
    path = results / "inference" / "safety" / "test" / "cross_safety" / "outputs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["output"] = "<script>alert('x')</script> & more"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = ",".join(["raw", *TASKS, FUSED])
    call(report, "--runs", runs, "--show_answers", results, "--results_dir", results)
    page = (results / "report" / "index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_judgements_stand_beside_the_answers(results, table, tmp_path):
    results = shutil.copytree(results, tmp_path / "results")
    write_verdicts(results, "safety", "judge", "1", [1, None, 0])
    answered = results / "inference" / "safety" / "test" / "cross_safety" / "outputs.jsonl"
    judged = results / "evaluation" / "safety" / "test" / "cross_safety" / "judge" / "judgements.jsonl"
    ids = [json.loads(line)["id"] for line in answered.read_text().splitlines()]
    rows = [json.loads(line) | {"id": id} for line, id in zip(judged.read_text().splitlines(), ids, strict=True)]
    judged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(report, "--runs", ",".join(["raw", *TASKS, FUSED]), "--show_answers", results, "--results_dir", results)
    page = (results / "report" / "index.html").read_text()
    assert re.findall(r"<h4>safety · flagged: ([^<]*)</h4>", page) == ["1", "no verdict", "0"]


def test_answers_to_other_questions_of_the_same_ids_stand_apart(results, table, tmp_path):
    """Two folders of data may number their questions alike."""
    results = shutil.copytree(results, tmp_path / "results")
    safety = results / "inference" / "safety" / "test" / "cross_safety" / "outputs.jsonl"
    first, *rest = map(json.loads, safety.read_text().splitlines())
    asked = [first | {"instruction": "Which way is north?"}, *rest[:-1], rest[-1] | {"input": "By night."}]
    safety.write_text("".join(json.dumps(row) + "\n" for row in asked))
    shown = side_by_side(results, ["raw", "safety"], "test")
    assert [(item["question"], len(item["answers"])) for item in shown] == [(rest[0]["instruction"], 2)]
    assert len(side_by_side(results, ["raw", "helpfulness"], "test")) == 3


def test_without_texts_no_text_of_the_data_stands_on_the_page(results, table):
    call(report, "--runs", ",".join(["raw", *TASKS, FUSED]), "--results_dir", results)
    page = (results / "report" / "index.html").read_text()
    rows = [
        json.loads(line)
        for task in TASKS
        for line in (results / "inference").glob(f"{task}/test/*/outputs.jsonl")
        for line in line.read_text().splitlines()
    ]
    assert rows and not any(row["instruction"] in page for row in rows)
    assert "no text of it stands here" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HARNESS = """<!doctype html><body style="margin:0">
<iframe id="f" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="said"></pre><script>
const frame = document.getElementById("f");
window.complaints = [];
frame.srcdoc = {page};
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const heading = page.querySelector("#runs thead th:nth-child(2) button");
  const first = () => page.querySelector("#runs tbody th .run").textContent;
  heading.click(); const lowest = first(); heading.click(); const highest = first();
  document.getElementById("said").textContent = JSON.stringify({{
    overflow: page.documentElement.scrollWidth - view.innerWidth,
    requests: view.performance.getEntriesByType("resource").map(entry => entry.name),
    without_text: [...page.querySelectorAll("svg, img")].filter(x => !x.getAttribute("aria-label") && !x.alt).length,
    complaints: window.complaints, lowest, highest}});
}};
</script>"""
LISTEN = """<script>
for (const kind of ["error", "warn", "log"]) console[kind] = (...x) => parent.complaints.push(String(x));
addEventListener("error", event => parent.complaints.push(event.message));</script>"""


def shown_by_a_browser(page, width, folder):
    """What a browser finds of a page's text: how much wider than the window it is, what it asks of others, ..."""
    quoted = json.dumps(page.replace("<head>", f"<head>{LISTEN}", 1)).replace("</", "<\\/")
    (folder / "harness.html").write_text(HARNESS.format(width=width, page=quoted))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (folder / "harness.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return json.loads(re.search(r'<pre id="said">(.*?)</pre>', dom, re.S)[1].replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("committed", [False, True])
def test_a_browser_shows_the_page_without_overflow_request_or_complaint(results, tmp_path, width, committed):
    write_report(results)
    folder = ROOT / "docs" / "report" if committed else results / "report"
    said = shown_by_a_browser((folder / "index.html").read_text(), width, tmp_path)
    rows = json.loads((folder / "table.json").read_text())["rows"]
    nll = {row["run"]: (row["metrics"]["mean_nll_per_token"] or {}).get("value") for row in rows}
    scored = {run: value for run, value in nll.items() if value is not None}
    assert said["overflow"] <= 0 and said["requests"] == [] and said["complaints"] == [] and said["without_text"] == 0
    assert (said["lowest"], said["highest"]) == (min(scored, key=scored.get), max(scored, key=scored.get))
