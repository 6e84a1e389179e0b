"""Finished judgements, kept: a second run asks nothing, a killed one goes on where it was."""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm


def cache_path(results_dir: str | Path) -> Path:
    return Path(results_dir) / "evaluation" / "judgements.sqlite"


class JudgementCache:
    """One SQLite file, results/evaluation/judgements.sqlite, keyed by judge, version of its prompt, and text."""

    def __init__(self, results_dir: str | Path):
        path = cache_path(results_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(path, timeout=60)
        self.connection.execute("CREATE TABLE IF NOT EXISTS judgement (key TEXT PRIMARY KEY, value TEXT NOT NULL)")

    def get(self, judge: str, version: str, text: str):
        """The kept judgement (any JSON value), or None."""
        rows = self.connection.execute("SELECT value FROM judgement WHERE key = ?", (_key(judge, version, text),))
        row = rows.fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, judge: str, version: str, text: str, value) -> None:
        with self.connection:  # one transaction: there whole or not at all
            self.connection.execute(
                "INSERT OR REPLACE INTO judgement VALUES (?, ?)", (_key(judge, version, text), json.dumps(value))
            )


def not_kept(results_dir: str | Path, judge: str, version: str, texts: list[str]) -> list[str]:
    """The different texts that `judge_texts` would ask about; writes nothing."""
    texts = list(dict.fromkeys(texts))
    if not cache_path(results_dir).exists():
        return texts
    cache = JudgementCache(results_dir)
    return [text for text in texts if cache.get(judge, version, text) is None]


def _key(judge: str, version: str, text: str) -> str:
    return hashlib.sha256(json.dumps([judge, version, text]).encode()).hexdigest()


def judge_texts(
    cache: JudgementCache,
    judge: str,
    version: str,
    texts: list[str],
    ask: Callable[[list[str]], Iterable[tuple[str, object]]],
    description: str,
) -> list:
    """One judgement (a JSON value) per text, in the texts' order; only texts without a kept one are asked.

    `ask` takes the different texts still to be judged and yields (text, judgement) as each is done, in any order; each
    is kept at once (of a text that had one already, the first). judge: the judge's name and, for local weights, their
    checksum; version: of the prompt.
    """
    judgements = {text: cache.get(judge, version, text) for text in dict.fromkeys(texts)}
    missing = [text for text, value in judgements.items() if value is None]
    with tqdm(total=len(judgements), initial=len(judgements) - len(missing), desc=description, unit="text") as bar:
        for text, value in ask(missing) if missing else ():
            if judgements[text] is not None:
                continue
            cache.put(judge, version, text, value)
            judgements[text] = value
            bar.update()
    return [judgements[text] for text in texts]
