# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that can be trusted: complete ones to go on from, and finite weights to save."""

from pathlib import Path

from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


STATE_NAME = "trainer_state.json"


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of the highest step that was written to its end; `None` if there is none.

    The Trainer writes its state last, so a checkpoint without a readable one was interrupted.
    """
    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and _is_complete(path):
            steps[int(step)] = str(path)
    return steps[max(steps)] if steps else None


def _is_complete(checkpoint):
    try:
        TrainerState.load_from_json(str(checkpoint / STATE_NAME))
    except (OSError, ValueError, TypeError):
        return False
    return True


def refuse_non_finite_weights(model: nn.Module, step: int, folder: str | Path) -> None:
    """Raises a `FloatingPointError` that names a weight with NaN or infinite values, if there is one."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.detach().isfinite().all():
            checkpoint = last_complete_checkpoint(folder)
            kept = "Nothing has been saved" if checkpoint is None else f"The last good checkpoint is {checkpoint}"
            raise FloatingPointError(
                f"After step {step}, `{name}` has values that are not finite, so it is not saved. {kept}. Go on from "
                "there with a lower learning rate, or look for rows without meaning."
            )
