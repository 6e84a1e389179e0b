"""The experts as one ensemble, which scores and generates: at every token their predictions are averaged.

python models/ensemble.py --average probabilities
python models/ensemble.py --average log_probabilities

One copy of the base serves all: a batch is run once, its rows once for each expert. A token costs as much as with all
experts one after the other, but for the reading of the weights; the cache of keys and values is as large as theirs.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
import config
from cli import TASKS_HELP, BaseArguments, flag, read_tasks
from config import TASKS


@dataclass
class EnsembleArguments(BaseArguments):
    """Flags of models/ensemble.py."""

    average: str = flag(
        "probabilities",
        "what is averaged at each token; log-probabilities are normalised again",
        choices=["probabilities", "log_probabilities"],
    )
    experts_dir: str | None = flag(None, "folder of the experts (default: outputs in --results_dir)")
    tasks: str = flag(",".join(TASKS), TASKS_HELP)
    experts: str | None = flag(
        None, "the experts, comma-separated: names in --experts_dir, or NAME=DIR for any adapter (default: --tasks)"
    )
    output: str | None = flag(None, "where to write (default: outputs/ensemble_<average> in --results_dir)")

    def __post_init__(self):
        if self.experts is None:
            self.experts = ",".join(read_tasks(self.tasks))


if __name__ == "__main__":
    cli.check_early(cli.parse, EnsembleArguments)

from torch import Tensor, nn

from models import base
from models.adapters import how_made
from models.base_identity import base_sha256, tokenizer_sha256
from models.mixture import MixtureForCausalLM, fuse, load_fused
from workspace import run_dir

SCRIPT = "ensemble.py"


class EachExpert(nn.Module):
    """The decoder of a mixture whose rows are sent to the experts one after the other (models/router.RowRouter): it
    reads a batch once for each expert; the experts' last hidden states lie side by side."""

    def __init__(self, decoder: nn.Module, num_experts: int):
        super().__init__()
        self.decoder, self.num_experts = decoder, num_experts

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        """input_ids (B, T); attention_mask (B, T), (B, 1, T, S) or several of them by the layers' types; position_ids
        (B, T) or (1, T). Returns the decoder's output with last_hidden_state (B, T, E D)."""
        batch = len(input_ids)

        def for_each(value: Tensor | dict | None) -> Tensor | dict | None:
            if isinstance(value, dict):
                return {name: for_each(one) for name, one in value.items()}
            if value is None or len(value) != batch:  # one for all rows
                return value
            return value.repeat(self.num_experts, *[1] * (value.dim() - 1))

        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        outputs = self.decoder(**{name: for_each(value) for name, value in inputs.items()}, **kwargs)
        hidden = outputs.last_hidden_state.unflatten(0, (self.num_experts, batch))  # (E, B, T, D)
        outputs.last_hidden_state = hidden.movedim(0, 2).flatten(2)
        return outputs


class EnsembleHead(nn.Module):
    """The base's head on each expert's hidden states, and the average of what they predict."""

    def __init__(self, lm_head: nn.Linear, num_experts: int, average: str):
        super().__init__()
        self.lm_head, self.num_experts, self.average = lm_head, num_experts, average

    def forward(self, hidden):
        """hidden (..., E D) -> log-probabilities (..., V), fp32: logits whose softmax is the average."""
        log_probs = self.lm_head(hidden.unflatten(-1, (self.num_experts, -1))).float().log_softmax(-1)
        if self.average == "probabilities":
            return log_probs.logsumexp(-2) - math.log(self.num_experts)
        return log_probs.mean(-2).log_softmax(-1)


def load_ensemble(
    folder: Path, base_model: str, dtype: str, device_map: str | dict | None = None
) -> MixtureForCausalLM:
    """The ensemble of a folder, on the named base's weights."""
    model = load_fused(folder, base_model, dtype, device_map)
    num_experts = model.mixture.num_experts
    model.model = EachExpert(model.model, num_experts)
    model.lm_head = EnsembleHead(model.lm_head, num_experts, model.mixture.average)
    return model


def asked(argv: list[str]) -> dict:
    """What run.json of a command line would record, as far as its flags tell (evaluator/reuse.py)."""
    return {"average": cli.parse(argv, EnsembleArguments).average}


@cli.command
def main(argv: list[str] | None = None) -> None:
    from models.loading import open_experts  # which loads what this module makes

    args = cli.parse(argv, EnsembleArguments)
    experts, base_model, data_source = open_experts(args)
    arguments = {
        "base_model": base_model,
        "base_sha256": base_sha256(base_model),
        "tokenizer_sha256": tokenizer_sha256(base_model),
        "data_source": data_source,
        "experts": [expert.name for expert in experts],
        "adapters_sha256": [expert.checksum for expert in experts],
        "average": args.average,
    }
    output = Path(args.output or config.outputs_dir(args.results_dir) / f"ensemble_{args.average}")
    state = run_dir.begin(output, SCRIPT, arguments, "move it away, or name another folder with --output")
    if state == "complete":
        print(f"{output} is already an ensemble of these experts: nothing to do")
        return
    base_config = base.load_base_config(base_model)
    for expert in experts:
        expert.attach(base_config)
    model = fuse(experts, base_config, 1, 0, average=args.average)
    model.save_pretrained(output)
    run_dir.finish(output, SCRIPT, arguments, train={}, meta=how_made(experts))
    print(f"{output}: an ensemble of {', '.join(arguments['experts'])}, by the average of their {args.average}")


if __name__ == "__main__":
    from models.ensemble import main

    main()
