"""AlpacaEval's own library (https://github.com/tatsu-lab/alpaca_eval, 0.6.6) as the judge of helpfulness.

It is set up by its configuration files alone: the annotator named, with the user's endpoint and model put in, and a
client configuration that has it ask through `KeptClient`. That keeps every answer as it comes: the library by itself
keeps them by chunks of 128, in a file inside its own installed package, and takes a failed request for an empty answer.
"""

import contextlib
import csv
import functools
import hashlib
import json
import logging
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import yaml
from openai.types import Completion
from openai.types.chat import ChatCompletion

import config
from config import UserError
from evaluator.judges.cache import JudgementCache
from workspace.client import MAX_RETRIES, TIMEOUT_S, complete, cost, make_client, server_url
from workspace.files import line_of, read_lines

ASKED_BY_OPENAI = "openai_completions"  # the library's decoder for OpenAI-compatible servers
CHAT_MARK = "<|im_start|>"  # how the library's prompt files begin their messages


class KeptClient:
    """What the library asks in the place of openai.OpenAI: an answer already kept, else the server's, kept at once.

    asked_path: for a dry run, the file to which what would be asked is added, one request a line; nothing is asked.
    """

    def __init__(self, base_url: str, results_dir: str, asked_path: str | None = None):
        self.base_url, self.results_dir, self.asked_path = base_url, results_dir, asked_path

    @property
    def chat(self):
        return self

    @property
    def completions(self):
        return self

    def create(self, **request) -> ChatCompletion | Completion:
        """The answer to client.chat.completions.create(...) or client.completions.create(...)."""
        kind = ChatCompletion if "messages" in request else Completion
        asked = {name: value for name, value in request.items() if name not in ("messages", "prompt")}
        key = (
            f"{request['model']} at {self.base_url}",
            json.dumps(asked, sort_keys=True),
            json.dumps(request.get("messages") or request["prompt"]),
        )
        cache = JudgementCache(self.results_dir)  # a connection of this thread's own
        value = cache.get(*key)
        if value is None and self.asked_path:
            with open(self.asked_path, "a", encoding="utf-8") as file:
                file.write(line_of(request))
            value = {"choices": [{"message": {"role": "assistant", "content": ""}, "text": ""}]}
        elif value is None:
            value = complete(shared_api(self.base_url, TIMEOUT_S, MAX_RETRIES), **request).to_dict()
            cache.put(*key, value)
        return kind.construct(**{**value, "usage": value.get("usage") or {"total_tokens": 0}})


@functools.cache
def shared_api(base_url: str, timeout_s: float, max_retries: int):
    """One client of a server for all requests; the library makes one for each."""
    return make_client(base_url, 1, timeout_s=timeout_s, max_retries=max_retries).api


def load_annotators(judge: str) -> tuple[dict[str, dict], Path]:
    """(the annotators of a configuration, its folder): by its name in the library, or a folder with a configs.yaml."""
    with quiet():
        from alpaca_eval.constants import EVALUATORS_CONFIG_DIR
    path = next((p for p in (EVALUATORS_CONFIG_DIR / judge, Path(judge)) if (p / "configs.yaml").is_file()), None)
    if path is None:
        raise UserError(
            f"--judge {judge}: must be an annotator of alpaca_eval, such as alpaca_eval_gpt4 or "
            f"weighted_alpaca_eval_gpt4_turbo (all: {EVALUATORS_CONFIG_DIR}), or a folder with a "
            "configs.yaml like theirs"
        )
    path = path.resolve() / "configs.yaml"
    try:
        annotators = yaml.safe_load(path.read_text(encoding="utf-8"))
        templates = {name: path.parents[1] / annotator["prompt_template"] for name, annotator in annotators.items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: must map annotators' names to their settings, each with a prompt_template") from error
    for name, template in templates.items():
        if not template.is_file():
            raise UserError(f"{path}: the prompt_template of {name}, {template}, is not there")
        annotators[name]["prompt_template"] = str(template)
    return annotators, path.parent


def derive_annotators(
    annotators: dict[str, dict], judge_url: str | None, judge_model: str | None
) -> tuple[dict, str | None]:
    """(the annotators with the user's model in them, the server they ask; None where they ask none by OpenAI's API)."""
    derived, urls = {}, set()
    for name, annotator in annotators.items():
        settings = dict(annotator.get("completions_kwargs") or {})
        if annotator.get("fn_completions", ASKED_BY_OPENAI) != ASKED_BY_OPENAI:
            if judge_url or judge_model:
                raise UserError(
                    f"--judge_url, --judge_model: are for annotators that ask by {ASKED_BY_OPENAI}, as "
                    f"alpaca_eval_gpt4 does; {name} asks by {annotator['fn_completions']}"
                )
            urls.add(None)
        else:
            own_url = (settings.pop("client_kwargs", None) or {}).get("base_url")
            urls.add(server_url(judge_url or own_url))
            if judge_model:
                settings["model_name"] = judge_model
                # by default the library goes by the model's name: "-instruct" would be asked by /v1/completions
                template = Path(annotator["prompt_template"]).read_text(encoding="utf-8")
                settings.setdefault("requires_chatml", template.lstrip().startswith(CHAT_MARK))
        derived[name] = {**annotator, "completions_kwargs": settings}
    if len(urls) > 1:
        raise UserError(f"the annotators of --judge ask at several places ({urls}); name one with --judge_url")
    return derived, urls.pop()


def checksum(annotators: dict[str, dict]) -> str:
    """sha256 of all that decides a judgement: the annotators' settings and the text of their prompts."""
    texts = {name: Path(a["prompt_template"]).read_text(encoding="utf-8") for name, a in annotators.items()}
    settings = {name: {**a, "prompt_template": texts[name]} for name, a in annotators.items()}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_configuration(
    folder: Path, annotators: dict, url: str | None, results_dir: str, concurrency: int, asked_path: str | None = None
) -> Path:
    """Write annotator.yaml and client.yaml (which never hold a key), and return the former."""
    client = folder.resolve() / "client.yaml"
    if url is not None:
        name = f"{KeptClient.__module__}.{KeptClient.__qualname__}"
        settings = {"base_url": url, "results_dir": str(Path(results_dir).resolve()), "asked_path": asked_path}
        client.write_text(yaml.safe_dump({"default": [{"client_class": name, **settings}]}), encoding="utf-8")
        asked = {"client_config_path": str(client), "num_procs": concurrency}
        annotators = {n: {**a, "completions_kwargs": a["completions_kwargs"] | asked} for n, a in annotators.items()}
    path = folder.resolve() / "annotator.yaml"
    path.write_text(yaml.safe_dump(annotators, sort_keys=False), encoding="utf-8")
    return path


def annotate(configuration: Path, model: list[dict], reference: list[dict], caching_path: Path | None) -> list[dict]:
    """The library's annotation of each pair, in order: preference from 1 (the reference's answer is better) to 2 (the
    model's), NaN where the judge's answer could not be read, and preference_raw_completion.

    caching_path: where the library keeps them; None where KeptClient does.
    """
    with quiet():
        from alpaca_eval.annotators import PairwiseAnnotator

        try:
            annotator = PairwiseAnnotator(annotators_config=str(configuration), caching_path=caching_path)
            chunk = 128 if caching_path else None  # what the library keeps at a time
            return annotator.annotate_head2head(reference, model, is_ordered=True, chunksize=chunk)
        except ImportError as error:  # a decoder's package
            raise UserError(f"--judge: {error}") from error


def length_controlled(annotations: list[dict]) -> np.ndarray | None:
    """The library's win rate of each item were both answers as long as each other, (N,) in [0, 1]: AlpacaEval 2's.

    For AlpacaEval's 805 items in their order. None, with a line that says so, where the table that the library fits
    them with (df_gamed.csv of the data set) cannot be had from the hub.
    """
    with quiet():
        import pandas
        from alpaca_eval.metrics import get_length_controlled_winrate
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download("tatsu-lab/alpaca_eval", "df_gamed.csv", repo_type="dataset", token=config.hf_token)
        except Exception as error:  # huggingface_hub and the network each raise their own kinds
            print(
                "no length-controlled win rate: it needs df_gamed.csv of the hub's data set tatsu-lab/alpaca_eval, "
                f"which could not be had ({type(error).__name__})"
            )
            return None
        table = pandas.DataFrame(annotations)
        get_length_controlled_winrate(table, save_weights_dir=None)  # adds the column; else it writes in its package
        return table["glm_preference"].to_numpy()


def human_agreement(folder: Path) -> float | None:
    """Share of the human majority's preferences that an annotator of the library shares, from the library's table;
    None for one that is not in it, and for the user's own."""
    with quiet():
        from alpaca_eval.constants import EVALUATORS_CONFIG_DIR
    if folder.parent != EVALUATORS_CONFIG_DIR.resolve():
        return None
    path = EVALUATORS_CONFIG_DIR.parent / "leaderboards" / "evaluators" / "evaluators_leaderboard.csv"
    with open(path, encoding="utf-8", newline="") as file:
        agreements = {row[""]: row["Human agreement"] for row in csv.DictReader(file)}
    return round(float(agreements[folder.name]) / 100, 4) if folder.name in agreements else None


def dry_run(annotators: dict, url: str | None, results_dir: str, model: list[dict], reference: list[dict]) -> str:
    """What judging would ask and cost, one line per model; nothing is asked or kept."""
    if url is None:
        raise UserError("--dry_run 1: counts the requests of annotators that ask by openai_completions only")
    asked = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "asked.jsonl"
        path.touch()
        annotate(write_configuration(Path(folder), annotators, url, results_dir, 1, str(path)), model, reference, None)
        for request in read_lines(path):
            messages = request.get("messages") or [{"content": text} for text in request["prompt"]]
            text = "".join(message["content"] for message in messages)
            asked[request["model"], request.get("max_tokens", 0)].append(text)
    lines = [cost(name, texts, max_tokens, url) for (name, max_tokens), texts in asked.items()]
    return "\n".join(lines) or "nothing to ask: every judgement is kept"


@contextlib.contextmanager
def quiet():
    """Without the library's log (every request, at INFO, by the root logger) and its dependencies' warnings."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.setLevel(level)
        root.handlers[:] = handlers
