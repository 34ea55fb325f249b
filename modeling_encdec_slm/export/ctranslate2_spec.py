# SPDX-License-Identifier: Apache-2.0
"""How weights are rounded to int8 for CTranslate2; imported only where it is installed."""

import numpy as np
from ctranslate2.specs.model_spec import NumpyVariable, Variable, index_spec
from ctranslate2.specs.transformer_spec import TransformerSpec


# What the numbers beside the int8 weights are stored in.
FLOAT_TYPES = {
    "int8": "float32",
    "int8_float32": "float32",
    "int8_float16": "float16",
    "int8_bfloat16": "bfloat16",
}
# The largest weight of each row. CPUs with AVX2 or AVX-512, but without VNNI, add two products of 8 bits in 16, which
# overflows where both are large. With 127, as CTranslate2 has it, log-probabilities of a trained model were off by
# 0.069 on such a CPU, and by 0.014 where nothing overflows; with 90 by 0.017 and 0.016; with 64, where nothing can
# overflow, by 0.021.
LARGEST_INT8 = 90


class NarrowInt8Spec(TransformerSpec):
    """A Transformer whose int8 weights keep a distance from the ends of their range."""

    def optimize(self, quantization: str | None = None) -> None:
        """Shares equal weights, and stores all of them in a type; as CTranslate2 does, but for int8.

        Args:
            quantization (`str`, *optional*): Any that CTranslate2 knows. `None` leaves the types of the model.
        """
        if quantization not in FLOAT_TYPES:
            super().optimize(quantization)
            return
        super().optimize()
        for name, value in self.variables().items():
            # What is shared stands under its second name as a string, what is set for good as a number.
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
