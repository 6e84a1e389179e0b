"""Run a command in this process on what a user might hand over: it ends well, or in one line that says why not."""

import contextlib
import io
import json
import math
import os
import signal
import string
import traceback
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# make fuzz sets how many cases of each kind; else, as in CI, a few that are the same each time
CASES = int(os.environ.get("H3FUSION_FUZZ_CASES", "0"))
FUZZ = settings(
    max_examples=CASES or 12,
    derandomize=not CASES,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
AT_MOST = 60  # seconds that a case may take

LOOK_ALIKES = (
    "### Response:",
    "\n\n### Response:",
    "### Instruction:",
    "### Input:\n",
    "</s>",
    "<s>",
    "<|im_end|>",
    "<pad>",
    "{instruction}",
    "{}",
    "%s",
    "{{ 7 * 7 }}",
    "<script>alert(1)</script>",
    "\x00",
    "\x1b[2J",
    "\r\n",
    "\u2028",
    "\u202eright to left",
    "\u200b",
    "\ufeff",
    "e\u0301",
    "שלום",
    "مرحبا",
    "👩‍👩‍👧‍👦",
    "\ud800",  # half a character
    "\udfff\ud800",
)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Lo", "Mn", "So", "Zs"]), max_size=20),
    st.sampled_from(LOOK_ALIKES),
    st.builds("{}{}{}".format, st.text(max_size=9), st.sampled_from(LOOK_ALIKES), st.text(max_size=9)),
)
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([10**9, -(10**9), 2**31, 2**63, 10**30]),
    st.floats(width=64),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
WORDS = st.text(string.ascii_letters + string.digits + "_-=.,:", max_size=12)


class TooLong(Exception):
    """A case that does not end."""


def outcome(main, *argv) -> str:
    """The line that a command ends in if it fails by a user's mistake; "" if it ends well. AssertionError for a
    traceback, for more than a line, for an exit code of its own."""

    def too_long(*_):
        raise TooLong(f"longer than {AT_MOST} s")

    errors, code = io.StringIO(), 0
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(AT_MOST)
    words = [str(word) for word in argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            main(words)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException as error:
        shown = "".join(traceback.format_exception(error)[-6:])
        raise AssertionError(f"{shell(words)}\nends in a traceback: {shown}") from None
    finally:
        signal.alarm(0)
        release_all()
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
    assert code in (0, 2) and len(lines) == (code == 2), f"{shell(words)}: exit code {code}: {errors.getvalue()[-800:]}"
    return lines[0] if lines else ""


def release_all() -> None:
    """Let go of the folders that a failed command had locked, as the end of its process would."""
    from workspace import run_dir

    for folder in list(run_dir._held):
        run_dir.release(folder)


def shell(words: list[str]) -> str:
    return " ".join(ascii(word) for word in words)


def lines_of(rows: list) -> str:
    """Rows as a jsonl file; surrogates as JSON spells them, numbers that JSON has not as Python does."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbers_are_finite(folder: Path) -> None:
    """AssertionError if a JSON file below a folder holds a number that is none."""
    for path in (*folder.rglob("*.json"), *folder.rglob("*.jsonl")):
        for word in ("NaN", "Infinity"):
            for line in path.read_text(encoding="utf-8").splitlines():
                outside = line.split('"')[0::2]  # of strings
                assert not any(word in part for part in outside), f"{path}: {line[:200]}"


def mutated(draw, value):
    """A JSON document with one thing in it changed: a value replaced, a key or an item gone, one added."""
    places = list(all_places(value))
    if not places:
        return draw(JSON)
    path = draw(st.sampled_from(places))
    inner = value = json.loads(json.dumps(value))
    for key in path[:-1]:
        inner = inner[key]
    how = draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "replace":
        inner[path[-1]] = draw(JSON)
    elif how == "remove":
        del inner[path[-1]]
    elif isinstance(inner, dict):
        inner[draw(TEXTS)] = draw(JSON)
    else:
        inner.append(draw(JSON))
    return value


def all_places(value, path: tuple = ()):
    """The paths to all values within a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from all_places(inner, (*path, key))
