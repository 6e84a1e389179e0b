"""transformers.Trainer with the fusion's three losses, their logging, and the router's own learning rate."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer

from config import TASKS
from data.encoding import LengthGroupedSampler
from models.llama_moe import LlamaMoeForCausalLM
from models.losses import gate_loss, mean_routing_probs, routing_hits
from workspace import run_dir


class AlignmentTrainer(Trainer):
    """Trainer whose length-grouped batches come in random order, and which goes on from where it was stopped."""

    def train_into(self, folder: Path, resume: bool) -> dict | None:
        """Train, with `resume` from the folder's last checkpoint if it has one, and save the model there.

        Returns the numbers of the training and its log; None in every process but the first.
        """
        checkpoint = run_dir.last_checkpoint(folder) if resume else None
        if checkpoint:
            print(f"Going on from {checkpoint}")
        result = self.train(resume_from_checkpoint=checkpoint)
        if not self.is_world_process_zero():
            return None
        self.model.save_pretrained(folder)
        numbers = {key: value for key, value in result.metrics.items() if isinstance(value, int | float)}
        return {**numbers, "log": self.state.log_history}

    def _get_train_sampler(self, train_dataset=None):
        samples = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(sample["input_ids"]) for sample in samples]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)


class MixtureTrainer(AlignmentTrainer):
    """Minimises L = L_SFT + lambda * L_gate + sum_i gamma_i * drift_i over all trainable parts of a fused model.

    gate_loss_weight: lambda. gate_balance: "task" lets tasks weigh alike in the gating loss whatever their numbers of
    samples, "sample" the samples. drift_weights: gamma by task. Each log line gets the terms, apart and unweighted,
    as means over the steps since the last one, and the routing accuracy over their samples.
    Batches need task_ids and routing_mask (data.encoding.Collator with routing=True).
    """

    # The losses below are already shares of the whole optimiser step: the Trainer must not divide them again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: LlamaMoeForCausalLM,
        *,
        gate_loss_weight: float,
        gate_balance: str,
        drift_weights: dict[str, float],
        router_learning_rate: float,
        **kwargs,
    ):
        super().__init__(model, **kwargs)
        self.gate_loss_weight = gate_loss_weight
        self.router_learning_rate = router_learning_rate
        expert_of_task = model.config.expert_of_task
        self.expert_of_task_id = torch.tensor([expert_of_task.get(task, -1) for task in TASKS])
        counts = torch.bincount(torch.tensor([sample["task"] for sample in self.train_dataset]), minlength=len(TASKS))
        self.weight_of_task_id = torch.ones(len(TASKS))
        if gate_balance == "task":
            self.weight_of_task_id = counts.sum() / ((counts > 0).sum() * counts.clamp(min=1))
        self.drift_weights = torch.zeros(model.config.num_experts)
        for task, weight in drift_weights.items():
            if task in expert_of_task:
                self.drift_weights[expert_of_task[task]] = weight
        self.start = [{name: t.to(self.args.device) for name, t in layer.items()} for layer in model.start_of_fusion()]
        self.samples_in_step = 1.0
        self.batches_in_step = 1
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
            optimizer.add_param_group({"params": moved, "lr": self.router_learning_rate, "weight_decay": 0.0})
        return optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimiser step; counts their samples, which the gating loss is averaged over."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = torch.tensor(float(sum(len(batch["task_ids"]) for batch in batches)), device=device)
        self.samples_in_step = self.accelerator.gather(samples).float().mean().item()  # per process: DDP averages
        self.batches_in_step = len(batches)
        self.metered_steps += 1
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This batch's share of the step's loss: the shares of a step's batches add up to the loss of the whole."""
        inputs = dict(inputs)
        task_ids = inputs.pop("task_ids")
        experts = self.expert_of_task_id.to(task_ids.device)[task_ids]  # (B,)
        weights = self.weight_of_task_id.to(task_ids.device)[task_ids]  # (B,)
        routing_mask = inputs.pop("routing_mask")
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, output_router_logits=True)
        sft = outputs.loss
        if self.args.average_tokens_across_devices:  # num_items_in_batch counts all processes' tokens; DDP averages
            sft = sft * self.accelerator.num_processes
        probs = mean_routing_probs(outputs.router_logits, routing_mask)  # (B, E)
        share = len(experts) / self.samples_in_step
        gate = gate_loss(probs, experts, weights) * share
        with torch.set_grad_enabled(bool(self.drift_weights.any())):
            # through the wrapped model's parameters: DDP and the optimiser see the same tensors
            drift = self.accelerator.unwrap_model(model).drift(self.start) / self.batches_in_step  # (E,)
        self._measure(sft, gate, drift, routing_hits(probs, experts))
        loss = sft + self.gate_loss_weight * gate + (self.drift_weights.to(drift.device) * drift).sum()
        return (loss, outputs) if return_outputs else loss

    def _measure(self, sft: Tensor, gate: Tensor, drift: Tensor, hits: Tensor) -> None:
        names = [expert["name"] for expert in self.model.config.experts]
        values = {"sft_loss": sft, "gate_loss": gate, "hits": hits.sum(), "samples": torch.tensor(float(len(hits)))}
        values |= {f"drift_{name}": value for name, value in zip(names, drift, strict=True)}
        for name, value in values.items():
            value = value.detach().float().to(sft.device)
            self.meters[name] = self.meters[name] + value if name in self.meters else value

    def log(self, logs, start_time=None):
        """Add the terms' means since the last log line."""
        if "loss" in logs and self.meters:
            sums = {name: self.accelerator.gather(value).mean().item() for name, value in self.meters.items()}
            hits, samples = sums.pop("hits"), sums.pop("samples")
            logs |= {name: value / self.metered_steps for name, value in sums.items()}
            logs["routing_accuracy"] = hits / samples
            self.meters, self.metered_steps = {}, 0
        super().log(logs, start_time)
