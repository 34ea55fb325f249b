# SPDX-License-Identifier: Apache-2.0
"""Evaluate checkpoints on tasks, with confidence intervals."""

from .evaluating import evaluate_checkpoint
from .tasks import list_tasks


__all__ = ["evaluate_checkpoint", "list_tasks"]
