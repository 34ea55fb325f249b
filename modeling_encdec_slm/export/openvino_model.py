# SPDX-License-Identifier: Apache-2.0
"""Run an ONNX export in OpenVINO."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import summarize_error
from ..export_manifest import find_export
from .bundles import import_engine, openvino_core
from .onnx_model import FORMATS, OrtEncDecSLM
from .onnx_runtime import has_links
from .onnx_tracing import WEIGHTS_FILE


# Types of OpenVINO by the names that users know. "int8" compresses weights and computes in float32.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "f32"}


class OpenVINOEncDecSLM(OrtEncDecSLM):
    """A model of this family that OpenVINO runs; load it with [`OpenVINOEncDecSLM.from_pretrained`].

    Apart from that it is used like [`OrtEncDecSLM`]. Several threads may call `generate` at the same time.
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "CPU",
        precision: str = "float32",
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> "OpenVINOEncDecSLM":
        """Load an ONNX export, with free lengths or of fixed shape; on the CPU it uses as many threads as torch.

        Args:
            name_or_path (`str` or `Path`): Folder of the export, or a repository on the Hub that has it at its top or
                in `onnx/`.
            device (`str`, *optional*, defaults to `"CPU"`): A device of OpenVINO, such as `"GPU"` or `"NPU"`. NPUs
                need fixed shapes.
            precision (`str`, *optional*, defaults to `"float32"`): Type of the computations: `"float32"`,
                `"bfloat16"` or `"float16"` (float32 on devices that lack them), or `"int8"`, which compresses the
                weights with NNCF when the model is loaded.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            subfolder (`str`, *optional*): Folder of the export within the repository or folder.

        Raises:
            ValueError: There is no such export, a file is missing or damaged, `precision` is unknown, or the device is
                not available.
            ImportError: A package of the `export` extra is not installed.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"`precision` is {precision!r}, but must be one of {', '.join(map(repr, PRECISIONS))}.")
        compiler = Compiler(device, precision)
        folder, manifest = find_export(name_or_path, FORMATS, revision=revision, subfolder=subfolder)
        return cls._from_graphs(folder, manifest, compiler.open_graph)


class Compiler:
    """Compiles graphs for a device.

    Args: as in [`OpenVINOEncDecSLM.from_pretrained`].

    Raises:
        ValueError: The device is not available.
    """

    def __init__(self, device: str, precision: str):
        openvino = import_engine("openvino")
        # The first call builds OpenVINO's table of dtypes; two threads that make it at once block each other forever.
        openvino.Type.f32.to_dtype()
        self._core = openvino_core()
        if device.split(".")[0] not in (available := self._core.available_devices):
            raise ValueError(
                f"`device` is {device!r}, but OpenVINO finds {', '.join(available)} on this machine. Choose one of "
                "them, or install the driver of the device."
            )
        self._device, self._is_compressed = device, precision == "int8"
        self._properties = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if device.startswith("CPU"):
            self._properties["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        self._unlinked_folder = None

    def open_graph(self, path: Path, outputs: Sequence[str] | None = None) -> "CompiledGraph":
        """Compile the graph in a file; given names of outputs, only the part that computes them.

        Raises:
            ValueError: OpenVINO cannot read the file.
        """
        try:
            model = self._core.read_model(str(self._resolve_links(path)))
        except RuntimeError as error:
            raise ValueError(
                f"{path.name} cannot be loaded by OpenVINO ({summarize_error(error)}). The file is damaged, or made "
                "for a newer OpenVINO: export again, or update OpenVINO."
            ) from error
        if outputs is not None:
            results = [result for result in model.get_results() if set(outputs) & result.input_value(0).get_names()]
            model = import_engine("openvino").Model(results, model.get_parameters())
        if self._is_compressed:
            nncf = import_engine("nncf")
            nncf.set_log_level("ERROR")
            model = nncf.compress_weights(model)
        return CompiledGraph(self._core.compile_model(model, self._device, self._properties))

    def _resolve_links(self, path):
        """Return a path in a folder without links: OpenVINO refuses weights outside of the folder of the graph."""
        if not has_links(path.parent):
            return path
        if self._unlinked_folder is None:
            self._unlinked_folder = _create_folder_beside((path.parent / WEIGHTS_FILE).resolve())
            weakref.finalize(self, shutil.rmtree, self._unlinked_folder, ignore_errors=True)
            for source in path.parent.glob("*.onnx*"):
                target = Path(self._unlinked_folder, source.name)
                try:
                    os.link(source.resolve(), target)
                except OSError:  # another file system
                    shutil.copy(source, target)
        return Path(self._unlinked_folder, path.name)


def _create_folder_beside(path):
    """Create a temporary folder beside a file, where it can be linked; elsewhere if that is not allowed."""
    try:
        return tempfile.mkdtemp(dir=path.parent)
    except OSError:
        return tempfile.mkdtemp()


class CompiledGraph:
    """A compiled graph (`openvino.CompiledModel`). Each call has its own request, so that threads can share it."""

    def __init__(self, model: Any):
        self._model = model
        # OpenVINO removes inputs that nothing reads.
        self._inputs = {name for port in model.inputs for name in port.names}
        self._idle_requests = []

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """Return outputs by name, for the names in `shapes`."""
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items() if name in self._inputs}
        try:
            request = self._idle_requests.pop()
        except IndexError:
            request = self._model.create_infer_request()
        try:
            results = request.infer(arrays, share_inputs=True)
            return {name: torch.from_numpy(results[name]) for name in shapes}
        finally:
            self._idle_requests.append(request)
