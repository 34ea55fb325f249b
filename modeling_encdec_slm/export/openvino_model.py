# SPDX-License-Identifier: Apache-2.0
"""An ONNX bundle that OpenVINO runs, with the face of a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig

from . import bundles, onnx_export, onnx_static
from .onnx_model import OrtEncDecSLM
from .onnx_runtime import DynamicEngine
from .onnx_static_runtime import StaticEngine


# What OpenVINO computes in, by the name that users know; weights of "int8" are compressed, the rest stays float32.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "f32"}


class OpenVINOEncDecSLM(OrtEncDecSLM):
    """A model of this family that OpenVINO runs; made by [`OpenVINOEncDecSLM.from_pretrained`].

    All else is as in [`OrtEncDecSLM`]: `generate`, pipelines, torch tensors on the CPU in and out.
    """

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str = "CPU", precision: str = "float32"
    ) -> "OpenVINOEncDecSLM":
        """The model of a folder that `export_onnx` wrote; on the CPU it runs on as many threads as torch does.

        Args:
            folder (`str` or `Path`): The bundle, of free or of fixed lengths, float32 or int8.
            device (`str`, *optional*, defaults to `"CPU"`): A device of OpenVINO, such as `"GPU"` or `"NPU"`; NPUs
                need fixed lengths.
            precision (`str`, *optional*, defaults to `"float32"`): What it computes in: `"float32"`, `"bfloat16"` or
                `"float16"`, which devices without such units compute in float32; or `"int8"`, which compresses the
                weights by NNCF when the model is loaded and leaves the activations to OpenVINO.

        Raises:
            ValueError: The folder is no ONNX bundle, a file of it is missing or damaged, `precision` is unknown, or
                there is no such device here.
            ImportError: The `export` extra is not installed.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"`precision` is {precision!r}, but must be one of {', '.join(map(repr, PRECISIONS))}.")
        folder = Path(folder)
        manifest = bundles.read_manifest(folder, onnx_export.FORM, onnx_static.FORM)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        compiler = Compiler(device, precision)
        if manifest["format"] == onnx_static.FORM:
            engine = StaticEngine(folder, manifest, lambda path: OpenVINOGraph(compiler(path)).run)
        else:
            engine = DynamicEngine(folder, config, lambda graph: OpenVINOGraph(compiler(graph)))
        return cls(engine, config, GenerationConfig.from_pretrained(folder), manifest)


class Compiler:
    """Compiles graphs for a device.

    Args: as in [`OpenVINOEncDecSLM.from_pretrained`].

    Raises:
        ValueError: There is no such device here.
    """

    def __init__(self, device: str, precision: str):
        self._core = bundles.required("openvino").Core()
        if device.split(".")[0] not in (available := self._core.available_devices):
            raise ValueError(
                f"`device` is {device!r}, but OpenVINO finds {', '.join(available)} here. Choose among them, or "
                "install the driver of the device."
            )
        self._device, self._is_compressed = device, precision == "int8"
        self._properties = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if device.startswith("CPU"):
            self._properties["INFERENCE_NUM_THREADS"] = torch.get_num_threads()

    def __call__(self, graph: Path | bytes) -> Any:
        """The compiled model of a graph, given as a path or as the bytes of it.

        Raises:
            ValueError: OpenVINO cannot read it.
        """
        name = "decoder_model.onnx" if isinstance(graph, bytes) else graph.name
        try:
            model = self._core.read_model(graph if isinstance(graph, bytes) else str(graph))
        except RuntimeError as error:
            raise ValueError(
                f"{name} cannot be read by OpenVINO ({' '.join(str(error).split())[:200]}): it is damaged, or made "
                "for a newer OpenVINO. Export again, or update OpenVINO."
            ) from error
        if self._is_compressed:
            nncf = bundles.required("nncf")
            nncf.set_log_level("ERROR")
            model = nncf.compress_weights(model)
        return self._core.compile_model(model, self._device, self._properties)


class OpenVINOGraph:
    """A graph in OpenVINO, as the engines call one.

    Args:
        model (`openvino.CompiledModel`): Runs it.
    """

    def __init__(self, model: Any):
        self._request = model.create_infer_request()
        # OpenVINO forgets inputs that nothing reads.
        self._inputs = {name for port in model.inputs for name in port.names}
        self._outputs = model.outputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in their order; they are the caller's."""
        inputs = {name: array for name, array in inputs.items() if name in self._inputs}
        results = self._request.infer(inputs, share_inputs=True)
        return [results[output] for output in self._outputs]

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """Outputs by name, for those that `shapes` names."""
        arrays = self.run({name: tensor.contiguous().numpy() for name, tensor in inputs.items()})
        named = {name: array for output, array in zip(self._outputs, arrays, strict=True) for name in output.names}
        return {name: torch.from_numpy(named[name]) for name in shapes}
