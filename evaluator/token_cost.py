"""What a token of a run costs, counted: multiplications by weights, relative to the base's.

Attention's products of states with states, norms and the judges that select among answers are not counted. An adapter
counts as merged into the base's weights, which it can be without a change of function.
"""

from pathlib import Path

from models.expert_ffn import PROJECTIONS
from models.mixture import ENSEMBLE, MixtureConfig, read_mixture


def base_multiplications(settings: dict) -> int:
    """Weights that a token is multiplied by in the base under a mixture: attention, FFN and head."""
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    head = settings.get("head_dim") or hidden // heads
    attention = 2 * hidden * head * (heads + settings["num_key_value_heads"])
    ffn = len(PROJECTIONS) * hidden * settings["intermediate_size"]
    return settings["num_hidden_layers"] * (attention + ffn) + hidden * settings["vocab_size"]


def mixture_multiplications(mixture: MixtureConfig) -> int:
    """What a mixture adds: its routers, and the low-rank products of the experts that a token is sent to. An ensemble,
    whose expert is one at a time, has no router."""
    settings = mixture.base
    hidden, ffn = settings["hidden_size"], settings["intermediate_size"]
    experts = len(PROJECTIONS) * mixture.expert_rank * (hidden + ffn) * mixture.num_experts_per_tok
    routers = hidden * mixture.num_experts if mixture.model_type != ENSEMBLE else 0
    return settings["num_hidden_layers"] * (experts + routers)


def relative_cost(folder: Path, record: dict | None) -> float:
    """A token's multiplications over the base's, of a run by its folder and run.json (None: the raw base). What
    is known of the base comes from a mixture's own config.json: the base need not be at hand."""
    if record is None:
        return 1.0
    script, arguments = record["run"]["script"], record["run"]["arguments"]
    if script == "select_answers.py":  # each candidate is written; a classifier picks before anything is
        return 1.0 if arguments["by"] == "classifier" else float(len(arguments["answers"]))
    mixture = read_mixture(folder)
    if mixture is None:
        return 1.0
    dense = base_multiplications(mixture.base)
    times = mixture.num_experts if mixture.model_type == ENSEMBLE else 1  # each expert runs on every token
    return times * (dense + mixture_multiplications(mixture)) / dense
