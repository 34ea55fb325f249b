# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices of a model's layers, and AdamW for all other weights, as one optimizer."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments


OPTIMIZERS = ("adamw", "muon")


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW side by side, with one learning rate.

    Muon orthogonalizes the updates of matrices. Embeddings, output heads, norms and biases are no such matrices, and
    are updated by AdamW. Updates of Muon are scaled to those of AdamW (`match_rms_adamw`, arXiv 2502.16982), so that
    both have the same learning rate, schedule and weight decay.

    Args:
        model ([`~transformers.PreTrainedModel`]): Its trainable weights are updated.
        lr (`float`): Learning rate.
        weight_decay (`float`, *optional*, defaults to 0.0): Not applied to norms and biases.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`): Of AdamW.

    Raises:
        ValueError: torch has no Muon.
    """

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95)
    ):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"Muon requires torch 2.9 or newer, but this is {torch.__version__}. Use AdamW.")
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        if (head := model.get_output_embeddings()) is not None:
            embeddings.add(id(head.weight))
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        matrices = [weight for weight in weights if weight.ndim == 2 and id(weight) not in embeddings]
        vectors = [weight for weight in weights if weight.ndim != 2]
        tables = [weight for weight in weights if id(weight) in embeddings]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)
        self.parts = (muon, adamw)
        # The groups are those of the parts, so that a scheduler changes the learning rate of both.
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of both parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def check_optimizer(name: str) -> None:
    """Check the name of an optimizer.

    Raises:
        ValueError: It is not one of `OPTIMIZERS`.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")


def build_optimizer(name: str, model: nn.Module, training_args: TrainingArguments) -> MuonWithAdamW | None:
    """Build the optimizer of a training run.

    Args:
        name (`str`): One of `OPTIMIZERS`.
        model ([`~torch.nn.Module`]): Is trained.
        training_args ([`~transformers.TrainingArguments`]): Learning rate, weight decay and betas.

    Returns:
        `None` for `"adamw"`, which the Trainer builds itself from `optim`.

    Raises:
        ValueError: The training shards the matrices of Muon.
    """
    if name == "adamw":
        return None
    if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError("`optimizer` is 'muon', which needs whole matrices, but FSDP shards them. Use AdamW or DDP.")
    betas = training_args.adam_beta1, training_args.adam_beta2
    return MuonWithAdamW(model, training_args.learning_rate, training_args.weight_decay, betas)


__all__ = ["OPTIMIZERS", "MuonWithAdamW", "build_optimizer", "check_optimizer"]
