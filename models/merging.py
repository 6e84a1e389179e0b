"""Merge aligned experts into one model without training: the rivals of the fusion.

python models/merging.py --method ties [--density 0.2] [--scale 1.0]      a method's usual coefficients, or yours
python models/merging.py --method ties --num_held_apart 30                coefficients tuned on training rows held apart

linear to model_stock are mergekit's (https://github.com/arcee-ai/mergekit), which writes a whole model; tsv_m, iso_c
and knots_ties are computed on the low-rank changes (models/core_space.py) and give an adapter.
"""

import shutil
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

if not __package__:  # run as a script, from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cli
import config
from cli import (
    DTYPES,
    TASKS_HELP,
    BaseArguments,
    check,
    check_at_least,
    check_not_given,
    check_seed,
    flag,
    is_positive,
    read_number,
    read_pairs,
    read_tasks,
)
from config import TASKS, UserError


@dataclass(frozen=True)
class Method:
    """A merging method: its usual coefficients (None: it has no such one), where they come from, and the grid that
    tuning tries. scale: of the merged change; density: the part of each expert's change that stays."""

    source: str
    scale: float | None = None
    density: float | None = None
    scales: tuple = (None,)
    densities: tuple = (None,)
    in_mergekit: bool = True


DELLA_EPSILON = 0.15  # mergekit's usual one
RANDOM = ("dare_ties", "della")  # drop entries at random
LEFT_OUT_AT = {"weights": None}  # a flag that run.json leaves out at this default
UNWEIGHTED = ("sce", "model_stock")  # find their own weights
SCALES, DENSITIES = (0.4, 0.7, 1.0, 1.5, 2.0), (0.2, 0.5)
METHODS = {
    "linear": Method("the mean of the weights (Wortsman et al. 2022, arXiv 2203.05482)"),
    "task_arithmetic": Method(
        "Ilharco et al. 2023, arXiv 2212.04089; 0.4 as arXiv 2306.01708 takes it untuned",
        scale=0.4,
        scales=(0.2, 0.4, 0.6, 0.8, 1.0),
    ),
    "ties": Method("Yadav et al. 2023, arXiv 2306.01708: 0.2 and 1", 1.0, 0.2, SCALES, (*DENSITIES, 1.0)),
    "dare_ties": Method("Yu et al. 2024, arXiv 2311.03099; 0.5 as mergekit's example", 1.0, 0.5, SCALES, DENSITIES),
    "della": Method("Deep et al. 2024, arXiv 2406.11617; 0.5 as mergekit's example", 1.0, 0.5, SCALES, DENSITIES),
    "sce": Method("Wan et al. 2024, arXiv 2408.07990: the 10 % that vary most", density=0.1, densities=(0.1, 0.5, 1.0)),
    "model_stock": Method("Jang et al. 2024, arXiv 2403.19522"),
    "tsv_m": Method("Gargiulo et al. 2024, arXiv 2412.00081", 1.0, scales=SCALES, in_mergekit=False),
    "iso_c": Method("Marczak et al. 2025, arXiv 2502.04959", 1.0, scales=SCALES, in_mergekit=False),
    "knots_ties": Method(
        "Stoica et al. 2024, arXiv 2410.19735; its code's 0.3 and 0.6", 0.6, 0.3, SCALES, (0.3, 1.0), in_mergekit=False
    ),
}


@dataclass
class MergeArguments(BaseArguments):
    """Flags of models/merging.py."""

    method: str | None = flag(None, "the merging method", choices=list(METHODS))
    experts_dir: str | None = flag(None, "folder of the experts (default: outputs in --results_dir)")
    tasks: str = flag(",".join(TASKS), TASKS_HELP)
    experts: str | None = flag(
        None, "the experts, comma-separated: names in --experts_dir, or NAME=DIR for any adapter (default: --tasks)"
    )
    scale: float | None = flag(None, "scale of the merged change (default: the method's usual one)")
    density: float | None = flag(None, "share of each expert's change that is kept (default: the method's usual one)")
    weights: str | None = flag(None, "weights of experts: EXPERT=WEIGHT, comma-separated (default: 1 each)")
    num_held_apart: int | None = flag(
        None,
        "tune scale and density on that many training prompts per task that no expert saw; -1 takes all of "
        "--data_source, if data/split.py gave the experts others",
    )
    data_source: str | None = flag(
        None, "data of these prompts: hub, sample or a folder (default: as the experts recorded)"
    )
    batch_size: int | None = flag(None, "samples per batch in tuning (default: 8)")
    dtype: str | None = flag(None, "precision of the base in tuning (default: auto)", choices=list(DTYPES))
    output: str | None = flag(
        None, "where to write (default: outputs/merge_<method> in --results_dir, merge_<method>_tuned if tuned)"
    )
    seed: int | None = flag(None, f"seed of what {' and '.join(RANDOM)} drop (default: 42)")

    def __post_init__(self):
        if self.experts is None:
            self.experts = ",".join(read_tasks(self.tasks))
        if self.method is None:
            raise UserError(f"say how to merge: --method {{{','.join(METHODS)}}}")
        method = METHODS[self.method]
        if method.scale is None:
            check_not_given(f"--method {self.method} has no scale", scale=self.scale)
        if method.density is None:
            check_not_given(f"--method {self.method} has no density", density=self.density)
        if self.weights is not None and self.method in UNWEIGHTED:
            raise UserError(f"--weights {self.weights}: --method {self.method} has no weights")
        for name, value in (("scale", self.scale), ("density", self.density)):
            check(name, value, value is None or is_positive(value), "a finite number above 0")
        check("density", self.density, (self.density or 0) <= 1, "at most 1")
        if self.method == "della" and self.density not in (None, 1):  # kept with a probability this far around it
            low, high = DELLA_EPSILON, 1 - DELLA_EPSILON
            fits = low < self.density < high
            check("density", self.density, fits, f"between {low} and {high}, or 1, with --method della")
        if self.method in RANDOM:
            self.seed = 42 if self.seed is None else self.seed
        else:
            check_not_given(f"--method {self.method} drops nothing at random", seed=self.seed)
        check_seed(self.seed)
        check_at_least(1, batch_size=self.batch_size)
        if self.num_held_apart is None:
            reason = "is for choosing coefficients, with --num_held_apart"
            check_not_given(reason, data_source=self.data_source, batch_size=self.batch_size, dtype=self.dtype)
            return
        self.batch_size, self.dtype = self.batch_size or 8, self.dtype or "auto"
        if method.scales == method.densities == (None,):
            raise UserError(f"--num_held_apart {self.num_held_apart}: --method {self.method} has nothing to choose")
        if self.num_held_apart < 1 and (self.num_held_apart != -1 or not self.data_source):
            raise UserError(f"--num_held_apart {self.num_held_apart}: must be 1 or more, or -1 with a --data_source")
        check_not_given("--num_held_apart chooses it", scale=self.scale, density=self.density)


if __name__ == "__main__":
    cli.check_early(cli.parse, MergeArguments)

import yaml

from data.encoding import Encoder
from data.held_apart import dealt_from, held_apart_records
from data.sources import Record, absolute_source, answer_records, read_rows, source_sha256
from models import base
from models.adapters import Expert, how_made, save_adapter
from models.base_identity import base_sha256, tokenizer_sha256
from models.core_space import CoreSpace, iso_c, knots_ties, mean_cosine, tsv_m
from models.expert_ffn import PROJECTIONS
from models.loading import device, load_run, open_experts
from models.validation import mean_nll_per_token
from workspace import run_dir
from workspace.drawn import drawn_by

SCRIPT = "merging.py"
MERGEKIT_FILE = "mergekit.yaml"


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = cli.parse(argv, MergeArguments)
    experts, args.base_model, recorded = open_experts(args)
    tuned = args.num_held_apart is not None
    expert_weights(args, experts)
    source = absolute_source(args.data_source) or recorded
    if tuned and source is None:
        raise UserError("the experts were aligned on different data, or do not record it: name it with --data_source")
    arguments = {
        "base_model": args.base_model,
        "base_sha256": base_sha256(args.base_model),
        "tokenizer_sha256": tokenizer_sha256(args.base_model),
        "data_source": source,
        "experts": [expert.name for expert in experts],
        "adapters_sha256": [expert.checksum for expert in experts],
        **flag_arguments(args),
    }
    if tuned:
        arguments["data_sha256"] = source_sha256(tasks_of(experts), "train", source)
        if set(tasks_of(experts)) != set(TASKS):
            arguments["tasks"] = list(tasks_of(experts))
    name = f"merge_{args.method}" + ("_tuned" if tuned else "")
    output = Path(args.output or config.outputs_dir(args.results_dir) / name)
    state = run_dir.begin(output, SCRIPT, arguments, "move it away, or name another folder with --output")
    if state == "complete":
        print(f"{output} is already merged from these experts: nothing to do")
        return
    base_config = base.load_base_config(args.base_model)
    for expert in experts:
        expert.attach(base_config)
    modules = low_rank_changes(experts, base_config.num_hidden_layers, expert_weights(args, experts))
    trained = {"mean_cosine_of_experts": mean_cosine([CoreSpace.of(deltas) for deltas in modules.values()])}
    chosen = coefficients(args)
    with run_dir.open_partial(output) as work:
        work.mkdir()
        if tuned:
            trained["tried"] = try_all(args, experts, modules, source, work)
            chosen = min(trained["tried"], key=lambda one: one["mean_nll_per_token"])["coefficients"]
        write_merge(args, experts, modules, chosen, output, work)
        meta = {"source": METHODS[args.method].source, **how_made(experts)}
        run_dir.finish(output, SCRIPT, arguments, {**trained, "coefficients": chosen}, meta)
    print(f"Merged {', '.join(arguments['experts'])} by {args.method} {chosen}: {output}")


def flag_arguments(args: MergeArguments) -> dict:
    """The part of run.json that the flags decide, whatever the experts are."""
    arguments = {"method": args.method, "num_held_apart": args.num_held_apart, **coefficients(args), "seed": args.seed}
    if args.weights is not None:
        arguments["weights"] = args.weights
    return arguments if args.num_held_apart is None else {**arguments, "dtype": base.dtype_name(args.dtype)}


def asked(argv: list[str]) -> dict:
    """What run.json of a command line would record, as far as its flags tell (evaluator/reuse.py)."""
    return flag_arguments(cli.parse(argv, MergeArguments))


def coefficients(args: MergeArguments) -> dict:
    """{scale, density} as given, else the method's usual ones; only those that it has, and none that are chosen."""
    if args.num_held_apart is not None:
        return {}
    method = METHODS[args.method]
    usual = {"scale": (args.scale, method.scale), "density": (args.density, method.density)}
    return {
        name: default if given is None else given for name, (given, default) in usual.items() if default is not None
    }


def expert_weights(args: MergeArguments, experts: list[Expert]) -> list[float]:
    """--weights in the experts' order. UserError for one that names no expert, or is no finite number above 0."""
    if args.weights is None:
        return [1.0] * len(experts)
    names = [expert.name for expert in experts]
    given = {name: read_number(value) for name, value in read_pairs(args.weights, "weights", "EXPERT=WEIGHT").items()}
    for name, weight in given.items():
        if name not in names or not is_positive(weight):
            raise UserError(f"--weights {args.weights}: {name}: needs one of {', '.join(names)}, and a number above 0")
    return [given.get(name, 1.0) for name in names]


def low_rank_changes(experts: list[Expert], num_layers: int, weights: list[float]) -> dict[str, list[tuple]]:
    """{module: [(A (r, in), B (out, r), weight x scaling) of each expert]}; UserError where an expert leaves a module
    alone."""
    modules = {}
    for layer, projection in product(range(num_layers), PROJECTIONS):
        deltas = [expert.delta(layer, projection) for expert in experts]
        if None in deltas:
            name = experts[deltas.index(None)].name
            raise UserError(
                f"--experts: {name} leaves layer {layer}'s {projection} as it is; merge experts of one form"
            )
        weighted = [(a, b, weight * scaling) for (a, b, scaling), weight in zip(deltas, weights, strict=True)]
        modules[f"model.layers.{layer}.mlp.{projection}"] = weighted
    return modules


def write_merge(
    args: MergeArguments, experts: list[Expert], modules: dict, chosen: dict, folder: Path, work: Path
) -> None:
    """Write the merged model (or adapter) into `folder`; work: a folder for what mergekit keeps between merges."""
    if METHODS[args.method].in_mergekit:
        run_mergekit(args, experts, chosen, folder, work / "experts")
    else:
        merged = merge_in_core_space(args.method, modules, chosen)
        weights = {name: (a.float(), b.float()) for name, (a, b) in merged.items()}
        save_adapter(folder, weights, {name: float(len(a)) for name, (a, _) in weights.items()}, args.base_model)


def merge_in_core_space(method: str, modules: dict[str, list[tuple]], chosen: dict) -> dict[str, tuple]:
    """{module: (A (R, in), B (out, R))} of a merge by singular vectors."""
    spaces = {name: CoreSpace.of(deltas) for name, deltas in modules.items()}
    if method == "knots_ties":
        return dict(zip(spaces, knots_ties(list(spaces.values()), **chosen), strict=True))
    return {name: {"tsv_m": tsv_m, "iso_c": iso_c}[method](space, **chosen) for name, space in spaces.items()}


def mergekit_settings(args: MergeArguments, experts: list[Expert], chosen: dict) -> dict:
    """mergekit's configuration of a merge; computed in float32, written in the base's own dtype."""
    path = str(base.local_folder(args.base_model))
    own, shared = {}, {}
    if args.method == "linear":
        own["weight"] = 1.0
    elif args.method == "task_arithmetic":
        own["weight"], shared["normalize"] = chosen["scale"], False
    elif args.method == "sce":
        shared["select_topk"] = chosen["density"]
    elif args.method != "model_stock":
        own = {"weight": 1.0, "density": chosen["density"]}
        shared = {"lambda": chosen["scale"], "normalize": True}  # the mean of those that agree, as TIES has it
    adapters = [{"model": {"path": path}, "lora": {"path": str(expert.folder.resolve())}} for expert in experts]
    models = [
        {"model": adapter, **({"parameters": of_expert} if own else {})}
        for adapter, weight in zip(adapters, expert_weights(args, experts), strict=True)
        for of_expert in [{name: value * weight if name == "weight" else value for name, value in own.items()}]
    ]
    return {
        "merge_method": args.method,
        **({} if args.method == "linear" else {"base_model": {"model": {"path": path}}}),
        "models": models,
        **({"parameters": shared} if shared else {}),
        "dtype": "float32",
        "out_dtype": str(base.own_dtype(base.load_base_config(args.base_model))).removeprefix("torch."),
    }


def run_mergekit(args: MergeArguments, experts: list[Expert], chosen: dict, folder: Path, cache: Path) -> None:
    """Have mergekit write the merged model, and beside it what it was asked; the experts, made dense, go to `cache`."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    settings = mergekit_settings(args, experts, chosen)
    options = MergeOptions(
        lora_merge_cache=str(cache),
        lora_merge_dtype="float32",
        random_seed=args.seed,
        write_model_card=False,
        lazy_unpickle=True,
        quiet=True,
    )
    try:
        run_merge(MergeConfiguration.model_validate(settings), str(folder), options)
    except Exception as error:  # it takes a folder that is gone for a hub id
        places = [folder, cache.parent, *(expert.folder for expert in experts)]
        if gone := next((place for place in places if not place.exists()), None):
            raise UserError(f"{gone}: is gone, as mergekit works with it; run the same command again") from error
        raise
    (folder / MERGEKIT_FILE).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def try_all(args: MergeArguments, experts: list[Expert], modules: dict, source: str, work: Path) -> list[dict]:
    """[{coefficients, nll_per_token of each task, mean_nll_per_token}] over the method's grid, on rows held apart."""
    records = held_apart_from(args, experts, source)
    method, tried = METHODS[args.method], []
    for scale, density in product(method.scales, method.densities):
        chosen = {k: v for k, v in (("scale", scale), ("density", density)) if v is not None}
        folder = work / "tried"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_merge(args, experts, modules, chosen, folder, work)
        model, tokenizer = load_run(folder, dtype=args.dtype)
        encoder = Encoder(tokenizer, model.config.max_position_embeddings)
        nll = mean_nll_per_token(model.to(device()), encoder, records, args.batch_size)
        tried.append({"coefficients": chosen, **nll})
        print(f"{args.method} {chosen}: {nll['mean_nll_per_token']:.4f} nats per token")
        del model
    return tried


def tasks_of(experts: list[Expert]) -> tuple[str, ...]:
    """The experts' tasks, by whose prompts coefficients are chosen. UserError for an expert without one."""
    for expert in experts:
        if expert.task is None:
            raise UserError(f"--num_held_apart: {expert.name} has no task whose prompts to take; name it with --tasks")
    return tuple(dict.fromkeys(expert.task for expert in experts))


def held_apart_from(args: MergeArguments, experts: list[Expert], source: str) -> dict[str, list[Record]]:
    """The rows that coefficients are chosen by; UserError where nobody knows which ones the experts were aligned on."""
    files = source_sha256(tasks_of(experts), "train", source)
    drawn = {expert.name: drawn_by(expert.folder) for expert in experts}
    if args.num_held_apart == -1:
        for name, ones in drawn.items():
            whole = dealt_from(source)  # a part of a file has another checksum than the file
            if any(one.reads(source, files) or one.reads(source, whole) for one in ones):
                raise UserError(
                    f"--num_held_apart -1: takes all training rows of {source}, but {name} was aligned on some of "
                    "them; name other data, or how many of its rows to hold apart"
                )
        return {task: answer_records(task, read_rows(task, "train", source)) for task in tasks_of(experts)}
    for name, one in [(name, one) for name, ones in drawn.items() for one in ones]:
        if (changed := one.changed_file(files)) or not one.reads(source, files):
            raise UserError(
                f"--num_held_apart: {name} was aligned on {f'another {changed}' if changed else 'other rows'} than "
                f"{source} has, so that nobody knows which rows are held apart; name its own data with --data_source, "
                "or take all rows of other data with --num_held_apart -1"
            )
    seen = {(one.num_samples, one.seed, one.beside) for ones in drawn.values() for one in ones}
    if not all(drawn.values()) or len(seen) != 1 or True in next(iter(seen)):
        raise UserError("--num_held_apart: needs experts whose run.json says, alike, which rows they were aligned on")
    ((num_trained, seed, _),) = seen
    return held_apart_records(tasks_of(experts), source, num_trained, args.num_held_apart, seed)


if __name__ == "__main__":
    main()
