# SPDX-License-Identifier: Apache-2.0
"""A language model's hidden states as they enter its output head, and what becomes of them there."""

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
    """How hidden states become logits: `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Args:
        weight (`torch.Tensor` of shape `(vocab_size, width)`, *optional*): `None` means that the hidden states are
            logits already.
        bias (`torch.Tensor` of shape `(vocab_size,)`, *optional*): Added to each position's logits.
        scale (`float`, *optional*, defaults to 1.0): Cohere's and Granite's kind of factor.
        softcap (`float`, *optional*): Gemma's `final_logit_softcapping`.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def vocab_size(self, hidden):
        return hidden.shape[-1] if self.weight is None else self.weight.shape[0]

    def logits(self, hidden):
        """Of shape (..., V), in float32, without gradients."""
        if self.weight is None:
            return hidden.detach().float()
        logits = hidden.detach() @ self.weight.detach().to(hidden.dtype).mT
        logits = (logits if self.bias is None else logits + self.bias.detach().to(logits.dtype)).float()
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def cast(self, dtype):
        """The same in another precision, without gradients."""
        weight, bias = (None if value is None else value.detach().to(dtype) for value in (self.weight, self.bias))
        return replace(self, weight=weight, bias=bias)

    def pulled_back(self, gradient, logits):
        """The gradient for `hidden @ weight.T + bias`, from that for the logits."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale


@dataclass
class HeadReader:
    """Runs a model up to its output head.

    The model's own forward runs, and only one position passes its head. In the first call that position's logits show
    whether this class knows what the model does behind its head. For a model of which it does not, logits are taken
    instead of hidden states: right as well, but as large as the vocabulary.

    Args:
        role (`str`): How messages call the model.
    """

    role: str
    head_is_known: bool | None = field(default=None, init=False)

    def __call__(self, model: nn.Module, **inputs: Any) -> torch.Tensor:
        """Hidden states of shape `(batch_size, length, width)` as they enter the head, or logits.

        Args:
            model (`nn.Module`): An unwrapped model with an output head.
            inputs: Those of its forward.
        """
        if self.head_is_known is False:
            return model(**inputs).logits
        hidden, logits = _run_to_head(model, inputs)
        if self.head_is_known is None:
            self.head_is_known = hidden is not None and _is_right(_head_of(model), hidden, logits)
            if not self.head_is_known:
                logger.warning(
                    f"The logits of the {self.role}, a {type(model).__name__}, are not those of its output head, so "
                    "they are computed whole: expect more memory than chunks of them take."
                )
                return self(model, **inputs)
        return hidden

    def head(self, model: nn.Module) -> OutputHead:
        """What turns the last call's result into logits."""
        return _head_of(model) if self.head_is_known else OutputHead(None)


def _run_to_head(model, inputs):
    """What enters the output head, and the logits of the first position of the first row."""
    captured = []

    def keep_one_position(module, args):
        if len(args) != 1:
            return None
        captured.append(args[0])
        return (args[0][:1, :1],)

    head = model.get_output_embeddings()
    if head is None:
        return None, None
    handle = head.register_forward_pre_hook(keep_one_position)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return (captured[0], logits) if len(captured) == 1 and captured[0].dim() == 3 else (None, None)


def _head_of(model):
    module = model.get_output_embeddings()
    weight, bias = (_whole(value) for value in (module.weight, getattr(module, "bias", None)))
    config = model.config.get_text_config(decoder=True)
    return OutputHead(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None))


def _whole(parameter):
    """A parameter, gathered once if it is sharded over processes."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _logit_scale(config: PreTrainedConfig) -> float:
    """The factor behind the head, by the names that transformers' families give it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            return factor
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return divisor if config.model_type == "hyperclovax" else 1 / divisor


@torch.no_grad()
def _is_right(head, hidden, logits):
    if logits.dim() != 3 or logits.shape[:2] != (1, 1) or logits.shape[-1] != head.weight.shape[0]:
        return False
    expected = head.logits(hidden[:1, :1])
    # Half precision rounds each of a thousand products; another function of the head is off by more.
    tolerance = 1e-4 if logits.dtype == torch.float32 and hidden.dtype == torch.float32 else 5e-2
    return bool(torch.allclose(expected, logits.float(), rtol=tolerance, atol=tolerance, equal_nan=True))
