# SPDX-License-Identifier: Apache-2.0
"""Distillation from a decoder-only teacher into an encoder-decoder student."""

from .distillation_config import Seq2SeqDistillationConfig
from .distillation_trainer import Seq2SeqDistillationTrainer


__all__ = ["Seq2SeqDistillationConfig", "Seq2SeqDistillationTrainer"]
