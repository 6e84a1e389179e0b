"""transformers.Trainer with the fusion's three losses, their logging, and the router's own learning rate."""

import math
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from cli import out_of_memory
from config import UserError
from data.encoding import IGNORED
from data.sampling import PaddedSamples, StepSampler
from models.cost import TrainingCost
from models.losses import gate_loss, mean_routing_probs, routing_hits
from models.mixture import MixtureForCausalLM, gather_with_experts
from models.prompt_routing import routed_by_prompt
from models.training_arguments import TrainArguments
from workspace import checkpoints, run_dir


class LogSums(TrainerCallback, ExportableState):
    """What a Trainer has summed up since its last log line, kept in its checkpoints: a resumed run logs as one that was
    never stopped. values: {name: float}, as `AlignmentTrainer.sums_of_log` has them."""

    def __init__(self, trainer: "AlignmentTrainer"):
        self.trainer, self.values = trainer, {}

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"values": self.values}}

    def on_train_begin(self, args, state, control, **_):
        kept = state.stateful_callbacks.get("LogSums", {}).get("attributes", {}).get("values")
        if kept and state.global_step:
            self.trainer.resume_log(kept)


def check_deepspeed(settings: dict) -> None:
    """UserError for a DeepSpeed configuration that would take the place of what flags say."""
    for section, flags in (
        ("optimizer", "--optim, --learning_rate, --router_learning_rate and --weight_decay"),
        ("scheduler", "--lr_scheduler_type and --warmup_steps"),
    ):
        if section in settings:
            raise UserError(f"the DeepSpeed configuration has a section {section!r}; leave it out: {flags} decide it")


class AlignmentTrainer(Trainer):
    """Trainer that goes on from where it was stopped, whose steps do not depend on the number of processes, and that
    stops at the first loss or gradient that is not finite."""

    def __init__(self, model, args: TrainArguments, train_dataset: list[dict], **kwargs):
        # transformers removes old checkpoints by their time, before the new one is sealed
        self.checkpoints_kept, args.save_total_limit = args.save_total_limit, None
        super().__init__(model, args, train_dataset=PaddedSamples(train_dataset), **kwargs)
        if self.is_deepspeed_enabled:
            check_deepspeed(self.accelerator.state.deepspeed_plugin.hf_ds_config.config)
        self.log_sums = LogSums(self)
        self.add_callback(self.log_sums)

    def train_into(self, folder: Path, resume: bool, started: float) -> dict | None:
        """Train, with `resume` from the folder's last checkpoint if it has one, and save the model there.

        started: time.perf_counter() at the command's beginning. Returns steps, seconds and peak memory (of all parts of
        a resumed run) and the log; None in every process but the first. UserError if the memory does not suffice.
        """
        cost = TrainingCost(started)
        self.add_callback(cost)
        checkpoint = checkpoints.last_whole(folder) if resume else None
        if checkpoint:
            print(f"Resuming from {checkpoint}")
            cost.resume(checkpoint)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            size, batches = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
            raise UserError(
                f"out of memory at {size} samples per device: take a smaller --batch_size (with "
                f"--gradient_accumulation_steps {2 * batches}, half of it makes the same steps), or "
                "--gradient_checkpointing 1"
            ) from error
        if self.state.global_step < self.state.max_steps:
            raise UserError(
                f"the training stopped at step {self.state.global_step} of {self.state.max_steps}; give the same "
                "command again to resume it"
            )
        if self.is_world_process_zero():
            run_dir.begin_again(folder)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT adds to what a killed process left of it
        self.save_model(str(folder))  # by all processes: they may hold a share each
        if not self.is_world_process_zero():
            return None
        (folder / "training_args.bin").unlink()  # run.json says it in words
        # without the Trainer's own summary, which counts the part after the last resume only
        log = [line for line in self.state.log_history if "train_runtime" not in line]
        return {"steps": self.state.global_step, **cost.total(), "log": log}

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._check_finite("loss", loss.item())
        return loss

    def _get_grad_norm(self, model, grad_norm=None) -> float:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # in float16 its scaler finds too large a scale so, and skips the step
            self._check_finite("gradient's norm", grad_norm)
        return grad_norm

    def _check_finite(self, what: str, value: float) -> None:
        """UserError for a loss or gradient that is not: from the next step on, every weight would be NaN."""
        if math.isfinite(value):
            return
        names = [str(self.train_dataset[index].get("id", f"row {index}")) for index in self._samples_of_step()]
        raise UserError(
            f"the {what} is {value} at step {self.state.global_step + 1}, of the samples {', '.join(names)}; the "
            "checkpoints before it are kept. Look at these samples, or lower the learning rate in a run of another name"
        )

    def _samples_of_step(self) -> list[int]:
        """The indices of the samples of the optimiser step under way, of all processes and batches."""
        sampler, size = self._get_train_sampler(), self.args.effective_batch_size
        epoch, step = divmod(self.state.global_step, math.ceil(len(sampler) / size))
        sampler.set_epoch(epoch)
        indices = islice(sampler, step * size, (step + 1) * size)
        return [index for index in indices if index < len(self.train_dataset)]

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *more) -> tuple[int, int]:
        """(epochs, batches of the next) that lie behind a resumed run. One that was stopped after its last step would
        make another: transformers looks whether a step was the last after it."""
        behind = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *more)
        return behind if self.state.global_step < max_steps else (num_train_epochs, 0)

    def sums_of_log(self) -> dict[str, float]:
        """The loss summed since the last log line, as a mean over processes, and the step of that line."""
        loss = self.accelerator.gather(self._tr_loss.reshape(1)).mean().item()
        return {"loss": loss, "logged_step": self._globalstep_last_logged}

    def resume_log(self, sums: dict[str, float]) -> None:
        """Go on from what `sums_of_log` gave."""
        self._tr_loss += sums["loss"]
        self._globalstep_last_logged = int(sums["logged_step"])

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            run_dir.begin_again(folder)
            run_dir.remove(checkpoint)  # what a killed process left of it
        self.log_sums.values = self.sums_of_log()  # by all processes, and none is ahead of the first
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
        if self.args.should_save:
            (checkpoint / "training_args.bin").unlink()  # a pickle that nothing reads
            checkpoints.seal(checkpoint)
            checkpoints.keep_last(folder, self.checkpoints_kept)

    def _get_train_sampler(self, train_dataset=None) -> StepSampler:
        args = self.args
        return StepSampler(
            [len(sample["input_ids"]) for sample in self.train_dataset],
            args.effective_batch_size,
            args.seed,
            args.train_sampling_strategy,
            padded_to=args.world_size * args.train_batch_size if args.world_size > 1 else 1,
        )


class MixtureTrainer(AlignmentTrainer):
    """Minimises L = L_SFT + lambda * L_gate + sum_i gamma_i * drift_i over all trainable parts of a fused model.

    gate_loss_weight: lambda; gate_schedule: "constant", or "linear": falling to 0 over the training. gate_balance:
    "task" lets tasks weigh alike in the gating loss whatever their numbers of samples, "sample" the samples.
    drift_weights: gamma by task. Each log line gets the terms, apart and unweighted, as means over the steps since the
    last one, and the routing accuracy over their samples; where every gamma is 0, the drift as it is when the line is
    written. Samples of a task without an expert have no gating loss.
    tasks: those of the samples, in the order of their ids. Batches need task_ids and routing_mask
    (data.encoding.Collator with routing=True, of the same tasks).
    """

    # The losses below are already shares of the whole optimiser step: the Trainer must not divide them again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: MixtureForCausalLM,
        *,
        tasks: tuple[str, ...],
        gate_loss_weight: float,
        gate_balance: str,
        gate_schedule: str = "constant",
        drift_weights: dict[str, float],
        router_learning_rate: float,
        **kwargs,
    ):
        super().__init__(model, **kwargs)
        if self.is_deepspeed_enabled:
            gather_with_experts(model)
        self.gate_loss_weight, self.gate_schedule = gate_loss_weight, gate_schedule
        self.router_learning_rate = router_learning_rate
        expert_of_task = model.mixture.expert_of_task
        # the last entry is that of the padding samples, whose task is -1
        self.expert_of_task_id = torch.tensor([*(expert_of_task.get(task, -1) for task in tasks), -1])
        ids = torch.tensor([tasks.index(sample["task"]) for sample in self.train_dataset])
        counts = torch.bincount(ids, minlength=len(tasks)) * (self.expert_of_task_id[:-1] >= 0)
        self.weight_of_task_id = torch.ones(len(tasks))
        if gate_balance == "task":
            self.weight_of_task_id = counts.sum() / ((counts > 0).sum().clamp(min=1) * counts.clamp(min=1))
        self.drift_weights = torch.zeros(model.mixture.num_experts)
        for task, weight in drift_weights.items():
            if weight:
                self.drift_weights[expert_of_task[task]] = weight
        self.start = [{name: t.to(self.args.device) for name, t in layer.items()} for layer in model.start_of_fusion()]
        self.routed_in_step = 1.0
        self.is_first_batch = True
        self.meters: dict[str, Tensor] = {}
        self.metered_steps = 0

    def create_optimizer(self, model=None):
        """AdamW as the Trainer makes it, with the router's matrices in a group of their own learning rate."""
        if self.optimizer is not None:  # the caller's own: left as it is
            return self.optimizer
        optimizer = super().create_optimizer(model)
        routers = {id(p) for n, p in (model or self.model).named_parameters() if ".router." in n and p.requires_grad}
        if routers:
            moved = [p for group in optimizer.param_groups for p in group["params"] if id(p) in routers]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in routers]
            own = {"lr": self.router_learning_rate, "weight_decay": self.args.weight_decay}
            optimizer.add_param_group({"params": moved, **own})
        return optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimiser step; counts their samples, which the gating loss is averaged over."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        routed = sum((self._experts(batch["task_ids"]) >= 0).sum() for batch in batches)
        routed = torch.as_tensor(routed, device=device, dtype=torch.float32)
        self.routed_in_step = max(self.accelerator.gather(routed).mean().item(), 1e-9)  # per process: DDP averages
        self.is_first_batch = True
        self.metered_steps += 1
        return batches, num_items_in_batch

    def _experts(self, task_ids: Tensor) -> Tensor:
        """The expert of each sample's task, (B,); -1 where it has none."""
        return self.expert_of_task_id.to(task_ids.device)[task_ids]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This batch's share of the step's loss: the shares of a step's batches add up to the loss of the whole."""
        inputs = dict(inputs)
        task_ids, routing_mask = inputs.pop("task_ids"), inputs.pop("routing_mask")
        experts = self._experts(task_ids)  # (B,)
        routed = experts >= 0
        weights = self.weight_of_task_id.to(task_ids.device)[task_ids] * routed  # (B,)
        of_prompt = routing_mask.bool() & (inputs["labels"] == IGNORED)
        with routed_by_prompt(self.accelerator.unwrap_model(model), of_prompt):
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch, output_router_logits=True)
        # num_items_in_batch counts the tokens of all processes, and DDP averages their gradients
        sft = outputs.loss * self.accelerator.num_processes
        probs = mean_routing_probs(outputs.router_logits, routing_mask)  # (B, E)
        gate = gate_loss(probs, experts.clamp(min=0), weights) * len(experts) / self.routed_in_step
        left = 1 - self.state.global_step / self.state.max_steps if self.gate_schedule == "linear" else 1
        loss = sft + self.gate_loss_weight * left * gate
        terms = {"sft_loss": sft, "gate_loss": gate}
        terms |= {"hits": (routing_hits(probs, experts) & routed).sum(), "routed": routed.sum()}
        if self.is_first_batch and self.drift_weights.any():
            # through the wrapped model's parameters: DDP and the optimiser see the same tensors
            drift = self.accelerator.unwrap_model(model).drift(self.start)  # (E,)
            loss = loss + (self.drift_weights.to(drift.device) * drift).sum()
            terms |= self._by_expert(drift)
        self.is_first_batch = False
        for name, value in terms.items():
            self.meters[name] = self.meters.get(name, 0) + value.detach().float()
        return (loss, outputs) if return_outputs else loss

    def sums_of_log(self) -> dict[str, float]:
        gather = self.accelerator.gather
        meters = {f"sum_{name}": gather(value.reshape(1)).mean().item() for name, value in self.meters.items()}
        return {**super().sums_of_log(), "steps": self.metered_steps, **meters}

    def resume_log(self, sums: dict[str, float]) -> None:
        super().resume_log(sums)
        self.metered_steps = int(sums["steps"])
        device = self.args.device
        self.meters = {n.removeprefix("sum_"): torch.tensor(x, device=device) for n, x in sums.items() if "sum_" in n}

    def _by_expert(self, drift: Tensor) -> dict[str, Tensor]:
        experts = self.model.mixture.experts
        return {f"drift_{expert['name']}": value for expert, value in zip(experts, drift, strict=True)}

    def log(self, logs, start_time=None):
        """Add the terms' means since the last log line."""
        if "loss" in logs and self.meters:
            sums = {name: self.accelerator.gather(value).mean().item() for name, value in self.meters.items()}
            hits, routed = sums.pop("hits"), sums.pop("routed")
            logs |= {name: value / self.metered_steps for name, value in sums.items()}
            if routed:
                logs["routing_accuracy"] = hits / routed
            if not self.drift_weights.any():
                with torch.no_grad():
                    drift = self.accelerator.unwrap_model(self.model).drift(self.start)
                logs |= {name: value.item() for name, value in self._by_expert(drift).items()}
            self.meters, self.metered_steps = {}, 0
        super().log(logs, start_time)
