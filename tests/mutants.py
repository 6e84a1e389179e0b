"""Change the core in one place at a time, by cosmic-ray's operators, and see whether its tests notice.

python tests/mutants.py --minutes 60        goes on from results/mutants.json; make mutants

If there are more changes than the time allows, those tried are drawn at random. Each runs in a process of its own,
forked from one that has the libraries imported, with the changed module in the place of the file's. A change that no
test notices has survived; the survivors are listed.
"""

import argparse
import ast
import difflib
import importlib.abc
import importlib.util
import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

TESTS = {  # of the core, whose tests are to notice every change
    "models/losses.py": ["tests/test_losses.py"],
    "models/expert_ffn.py": ["tests/test_expert_ffn.py"],
    "models/router.py": ["tests/test_router.py"],
    "evaluator/statistics.py": ["tests/test_statistics.py"],
    "evaluator/paired.py": ["tests/test_paired.py"],
    "data/encoding.py": ["tests/test_encoding.py"],
}
AT_MOST = 120  # seconds that the tests of a change may take: one that never ends is noticed
PRELOADED = ["torch", "transformers", "peft", "scipy.stats", "pytest", "conftest", "safetensors.torch", "accelerate"]


def without_notes(source: str) -> str:
    """A module's syntax without docstrings and annotations, which change nothing that runs."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None)
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    return ast.dump(tree)


def all_mutants(path: str) -> dict[str, str]:
    """{"operator occurrence": the changed source} of a module, of those that change what runs."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import mutate_code

    source, mutants = (ROOT / path).read_text(encoding="utf-8"), {}
    original, seen = without_notes(source), set()
    for name in sorted(cosmic_ray.plugins.operator_names()):
        operator_class = cosmic_ray.plugins.get_operator(name)
        if operator_class.arguments():
            continue
        occurrence = 0
        while (changed := mutate_code(source, operator_class(), occurrence)) is not None:
            try:
                form = without_notes(changed)
            except SyntaxError:  # no Python: nothing to notice
                form = original
            if form != original and form not in seen:
                seen.add(form)
                mutants[f"{name} {occurrence}"] = changed
            occurrence += 1
    return mutants


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from other source than its file's."""

    def __init__(self, name: str, path: Path, source: str):
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self, origin=str(self.path)) if name == self.name else None

    def exec_module(self, module):
        module.__file__ = str(self.path)
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def run_tests(path: str, source: str) -> None:
    """Run a module's tests with it changed; the exit code says whether they pass."""
    import pytest
    import torch

    os.chdir(ROOT)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    torch.set_num_threads(1)
    sys.meta_path.insert(0, Changed(path.removesuffix(".py").replace("/", "."), ROOT / path, source))
    os._exit(int(pytest.main(["-x", "-q", "-m", "not slow", *TESTS[path]])))


def passes(context, path: str, source: str) -> bool:
    process = context.Process(target=run_tests, args=(path, source))
    process.start()
    process.join(AT_MOST)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode == 0


def change(path: str, source: str) -> str:
    """The lines that a change takes and gives."""
    before, after = (ROOT / path).read_text(encoding="utf-8").splitlines(), source.splitlines()
    lines = difflib.unified_diff(before, after, lineterm="", n=0)
    return "\n".join(line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---"))


def table(kept: dict[str, dict]) -> str:
    lines = ["| module | changes there are | tried | noticed |", "| --- | --- | --- | --- |"]
    for path, one in kept.items():
        noticed = len(one["tried"]) - len(one["survived"])
        share = f"{noticed} ({100 * noticed / max(len(one['tried']), 1):.0f} %)"
        lines.append(f"| {path} | {one['mutants']} | {len(one['tried'])} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="how long to try changes (default: 60)")
    parser.add_argument("--only", default="", help="the modules whose path has this in it")
    parser.add_argument("--kept", type=Path, default=ROOT / "results" / "mutants.json", help="where results are kept")
    args = parser.parse_args()
    from tqdm import tqdm

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    kept = json.loads(args.kept.read_text()) if args.kept.exists() else {}
    todo = []
    for path in (path for path in TESTS if args.only in path):
        mutants = all_mutants(path)
        one = kept.setdefault(path, {"mutants": 0, "tried": [], "survived": {}})
        one["mutants"] = len(mutants)
        assert passes(context, path, (ROOT / path).read_text(encoding="utf-8")), f"{path}: its tests fail unchanged"
        todo += [(path, name, source) for name, source in mutants.items() if name not in one["tried"]]
    random.Random(0).shuffle(todo)
    end = time.monotonic() + 60 * args.minutes
    args.kept.parent.mkdir(parents=True, exist_ok=True)
    for path, name, source in tqdm(todo, unit="change"):
        if time.monotonic() > end:
            break
        survived = passes(context, path, source)
        kept[path]["tried"].append(name)
        if survived:
            kept[path]["survived"][name] = change(path, source)
        args.kept.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(table(kept))
    for path, one in kept.items():
        for name, lines in one["survived"].items():
            print(f"\n{path}: {name}\n{lines}")


if __name__ == "__main__":
    main()
