"""What a token of a run costs, counted: multiplications by weights, relative to the base's.

Attention's products of states with states, norms and the judges that select among answers are not counted. An adapter
counts as merged into the base's weights, which it can be without a change of function.
"""

from pathlib import Path

from models.expert_ffn import PROJECTIONS
from workspace.files import read_json


def base_multiplications(settings: dict) -> int:
    """Weights that a token is multiplied by in the Llama under a mixture: attention, FFN and head."""
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    head = settings.get("head_dim") or hidden // heads
    attention = 2 * hidden * head * (heads + settings["num_key_value_heads"])
    ffn = len(PROJECTIONS) * hidden * settings["intermediate_size"]
    return settings["num_hidden_layers"] * (attention + ffn) + hidden * settings["vocab_size"]


def mixture_multiplications(settings: dict) -> int:
    """What a mixture adds: its routers, and the low-rank products of the experts that a token is sent to."""
    hidden, ffn = settings["hidden_size"], settings["intermediate_size"]
    experts = len(PROJECTIONS) * settings["expert_rank"] * (hidden + ffn) * settings["num_experts_per_tok"]
    return settings["num_hidden_layers"] * (experts + hidden * len(settings["experts"]))


def relative_cost(folder: Path, record: dict | None) -> float:
    """A token's multiplications over the base's, of a run by its folder and run.json (None: the raw base). What
    is known of the base comes from a mixture's own config.json: the base need not be at hand."""
    if record is None:
        return 1.0
    script, arguments = record["run"]["script"], record["run"]["arguments"]
    if script == "select_answers.py":  # each candidate is written; a classifier picks before anything is
        return 1.0 if arguments["by"] == "classifier" else float(len(arguments["answers"]))
    settings = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if "num_experts_per_tok" not in settings:
        return 1.0
    dense = base_multiplications(settings)
    if script == "ensemble.py":  # each expert runs on every token, and there is no router
        return len(settings["experts"]) * (dense + mixture_multiplications({**settings, "experts": []})) / dense
    return (dense + mixture_multiplications(settings)) / dense
