# SPDX-License-Identifier: Apache-2.0
"""Output heads of language models: hidden states that enter them, and the logits that they become."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig


logger = logging.getLogger(__name__)


@dataclass
class OutputHead:
    """Compute logits from hidden states: `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Args:
        weight (`torch.Tensor` of shape `(vocab_size, width)`, *optional*): `None` means that the hidden states are
            logits already.
        bias (`torch.Tensor` of shape `(vocab_size,)`, *optional*): Added to the logits of each position.
        scale (`float`, *optional*, defaults to 1.0): Factor of the logits, as in Cohere and Granite.
        softcap (`float`, *optional*): `final_logit_softcapping` of Gemma.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def vocab_size(self, hidden: torch.Tensor) -> int:
        """Number of tokens that are scored."""
        return hidden.shape[-1] if self.weight is None else self.weight.shape[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute float32 logits of shape `(..., vocab_size)`, without gradients."""
        if self.weight is None:
            return hidden.detach().float()
        logits = hidden.detach() @ self.weight.detach().to(hidden.dtype).mT
        logits = (logits if self.bias is None else logits + self.bias.detach().to(logits.dtype)).float()
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def cast(self, dtype: torch.dtype) -> "OutputHead":
        """Return the head in another precision, without gradients."""
        weight, bias = (None if value is None else value.detach().to(dtype) for value in (self.weight, self.bias))
        return replace(self, weight=weight, bias=bias)

    def projection_gradient(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Compute the gradient for `hidden @ weight.T + bias` from the gradient for the logits."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale


@dataclass
class HeadReader:
    """Run a model up to its output head.

    The model's own forward runs, but only one position passes its head. In the first call the logits of that position
    show whether [`OutputHead`] computes what the model computes. If not, the model's logits are returned instead of
    hidden states: correct, but allocates full logits.

    Args:
        role (`str`): Name of the model in messages.
    """

    role: str
    head_is_known: bool | None = field(default=None, init=False)

    def __call__(self, model: nn.Module, **inputs: Any) -> torch.Tensor:
        """Return the hidden states that enter the head, or logits, of shape `(batch_size, length, width)`.

        Args:
            model (`nn.Module`): An unwrapped model with an output head.
            inputs: Arguments of its `forward`.
        """
        if self.head_is_known is False:
            return model(**inputs).logits
        hidden, logits = _run_to_head(model, inputs)
        if self.head_is_known is None:
            self.head_is_known = hidden is not None and _gives_logits(_find_head(model), hidden, logits)
            if not self.head_is_known:
                logger.warning(
                    f"The logits of the {self.role} ({type(model).__name__}) are not a plain function of its output "
                    "head, so they are computed as a whole, which needs more memory."
                )
                return self(model, **inputs)
        return hidden

    def head(self, model: nn.Module) -> OutputHead:
        """Return the head that turns the result of the last call into logits."""
        return _find_head(model) if self.head_is_known else OutputHead(None)


def _run_to_head(model, inputs):
    """Return what enters the output head, and the logits of the first position of the first row."""
    captured = []

    def keep_one_position(module, args):
        if len(args) != 1:
            return None
        captured.append(args[0])
        return (args[0][:1, :1],)

    head = model.get_output_embeddings()
    # PEFT wraps a head that it trains; the weight of its linear layer is not all that produces the logits.
    if not isinstance(head, nn.Linear):
        return None, None
    handle = head.register_forward_pre_hook(keep_one_position)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return (captured[0], logits) if len(captured) == 1 and captured[0].dim() == 3 else (None, None)


def _find_head(model):
    module = model.get_output_embeddings()
    weight, bias = (_gather(value) for value in (module.weight, module.bias))
    config = model.config.get_text_config(decoder=True)
    return OutputHead(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None))


def _gather(parameter):
    """Gather a parameter that is sharded over processes."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _logit_scale(config: PreTrainedConfig) -> float:
    """Return the factor of the logits, under the names that transformers' models give it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            return factor
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return divisor if config.model_type == "hyperclovax" else 1 / divisor


@torch.no_grad()
def _gives_logits(head, hidden, logits):
    """Return whether a head turns hidden states into a model's logits."""
    if logits.dim() != 3 or logits.shape[:2] != (1, 1) or logits.shape[-1] != head.weight.shape[0]:
        return False
    expected = head.logits(hidden[:1, :1])
    # Half precision rounds each product; another function of the head differs by more.
    tolerance = 1e-4 if logits.dtype == torch.float32 and hidden.dtype == torch.float32 else 5e-2
    return bool(torch.allclose(expected, logits.float(), rtol=tolerance, atol=tolerance, equal_nan=True))
