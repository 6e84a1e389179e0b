"""A dial for a fused model: numbers added to its routers' logits when it answers and is scored, without any training.

`safety=1.0,helpfulness=-0.5` asks the safety expert more and the helpfulness expert less; `safety=off` takes an expert
out, `safety=only` leaves it alone. The paper's own dial, one training per drift weight, is align_basemodel.py's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from cli import read_number, read_pairs
from config import BIAS, UserError
from models.mixture import ENSEMBLE, MixtureForCausalLM, read_mixture

OFF, ONLY = "off", "only"
LARGEST = 1e4  # of a bias: beyond any logit, and far from where float32 ends


@dataclass(frozen=True)
class ExpertBias:
    """experts: their names, in the model's order; added: what each one's logits get; off: which are taken out."""

    experts: tuple[str, ...]
    added: tuple[float, ...]
    off: tuple[bool, ...]

    @property
    def text(self) -> str:
        """The shortest `--expert_bias` that says the same; "" where nothing is changed."""
        values = [OFF if off else number_text(added) for added, off in zip(self.added, self.off, strict=True)]
        return ",".join(f"{name}={value}" for name, value in zip(self.experts, values, strict=True) if value != "0")

    @property
    def suffix(self) -> str:
        """What the names of answers and scores get: `_bias_safety_1_helpfulness_-0.5`."""
        return BIAS + self.text.replace("=", "_").replace(",", "_") if self.text else ""


def number_text(value: float) -> str:
    """A number as briefly as it can be read back."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def read_bias(text: str | None, folder: Path | None) -> ExpertBias | None:
    """`--expert_bias` for the fused model of a folder; None without the flag. UserError for a run that has no router,
    an expert that it does not have, what is no finite number, off or only, and for all experts taken out."""
    if text is None:
        return None
    mixture = read_mixture(folder)
    if mixture is None or mixture.model_type == ENSEMBLE:
        raise UserError(f"--expert_bias {text}: only a fused model has a router; leave it out")
    experts = tuple(expert["name"] for expert in mixture.experts)
    form = f"EXPERT=VALUE with one of {', '.join(experts)}"
    values = read_pairs(text, "expert_bias", form)
    if others := set(values) - set(experts):
        raise UserError(f"--expert_bias {text}: {min(others)}: write {form}")
    if ONLY in values.values():
        if len(values) > 1:
            raise UserError(f"--expert_bias {text}: only takes all the others out; name that expert alone")
        values = {name: OFF for name in experts if name not in values}
    off = tuple(values.get(name) == OFF for name in experts)
    if all(off):
        raise UserError(f"--expert_bias {text}: takes all experts out; leave one")
    numbers = [0.0 if values.get(name) == OFF else number(values.get(name, "0"), text) for name in experts]
    added = tuple(value + 0.0 for value in numbers)  # -0 is 0
    return ExpertBias(experts, added, off)


def number(value: str, text: str) -> float:
    """A number within ±LARGEST; UserError for anything else."""
    read = read_number(value)
    if not abs(read) <= LARGEST:  # nor NaN
        raise UserError(f"--expert_bias {text}: {value or 'nothing'}: is no number within ±{LARGEST:g}, off or only")
    return read


def set_expert_bias(model: MixtureForCausalLM, bias: ExpertBias) -> None:
    """Let a fused model's routers add the bias from now on; with fewer experts left than its top-k, all are used."""
    added, off = torch.tensor(bias.added), torch.tensor(bias.off)
    model.set_top_k(min(model.mixture.num_experts_per_tok, sum(not out for out in bias.off)))
    for block in model.blocks:
        block.router.bias, block.router.off = added.to(block.router.weight.device), off.to(block.router.weight.device)
