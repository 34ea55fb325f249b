# SPDX-License-Identifier: Apache-2.0
"""Rounding of weights to int8 for CTranslate2. This module requires the package."""

import numpy as np
from ctranslate2.specs.model_spec import NumpyVariable, Variable, index_spec
from ctranslate2.specs.transformer_spec import TransformerSpec


# Types of the numbers other than int8 weights.
FLOAT_TYPES = {
    "int8": "float32",
    "int8_float32": "float32",
    "int8_float16": "float16",
    "int8_bfloat16": "bfloat16",
}
# The largest weight of each row. CPUs with AVX2 or AVX-512 but without VNNI add two 8-bit products in 16 bits, which
# overflows if both are large. With 127, CTranslate2's own choice, log-probabilities of a trained model were off by
# 0.069 on such a CPU and by 0.014 on others; with 90 by 0.017 and 0.016; with 64, which never overflows, by 0.021.
LARGEST_INT8 = 90


class NarrowInt8Spec(TransformerSpec):
    """A spec whose int8 weights do not use their full range."""

    def optimize(self, quantization: str | None = None) -> None:
        """Share equal weights and convert all weights to a type, as CTranslate2 does, except for int8.

        Args:
            quantization (`str`, *optional*): A type of CTranslate2. `None` keeps the types of the model.
        """
        if quantization not in FLOAT_TYPES:
            super().optimize(quantization)
            return
        super().optimize()
        for name, value in self.variables().items():
            # Shared weights are strings under their second name, constants are numbers.
            if isinstance(value, Variable) and not value.is_scalar():
                scope, _, attribute = name.rpartition("/")
                _store(index_spec(self, scope), attribute, value, FLOAT_TYPES[quantization])


def _store(layer, attribute, value, float_type):
    if not hasattr(layer, f"{attribute}_scale"):
        setattr(layer, attribute, value.to(float_type))
        return
    weight = value.to("float32").numpy()
    largest = np.abs(weight).max(axis=1)
    scale = (LARGEST_INT8 / np.where(largest == 0, 1, largest)).astype(np.float32)
    setattr(layer, attribute, NumpyVariable(np.rint(weight * scale[:, None]).astype(np.int8)))
    setattr(layer, f"{attribute}_scale", NumpyVariable(scale))


__all__ = ["LARGEST_INT8", "NarrowInt8Spec"]
