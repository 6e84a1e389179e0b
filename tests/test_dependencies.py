"""requirements.lock: the pins of the requirements files, with checksums, of everything but PyTorch."""

import re

from conftest import ROOT


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pinned = (re.match(r"([A-Za-z0-9_.-]+)==([^ \\;]+)", line) for line in lines)
    return {found[1].lower().replace("_", "-"): found[2] for found in pinned if found}


def test_the_lock_has_every_pin_and_a_checksum_for_each():
    locked = pins("requirements.lock")
    for name in ("requirements.txt", "requirements-eval.txt"):
        for package, version in pins(name).items():
            assert package == "torch" or locked[package] == version, package
    assert not any(re.match("torch$|nvidia-|triton", name) for name in locked)
    blocks = re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text())[1:]
    assert len(blocks) == len(locked) and all("--hash=sha256:" in block for block in blocks)


def test_the_lock_names_no_index():
    """It is checked against the public one, wherever it is installed from."""
    assert "http" not in re.sub(r"httpx2?|httpcore2?|httptools", "", (ROOT / "requirements.lock").read_text())
