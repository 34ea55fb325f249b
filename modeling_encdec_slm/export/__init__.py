# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of this family for other runtimes: CTranslate2 and ONNX."""
