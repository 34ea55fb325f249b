# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoints of the predecessor (microsoft/encoder-decoder-slm), whoever wrote them, and tells their sizes."""

import functools
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint_folders import listed


# The predecessor's `MuConfig` with its defaults, which are the sizes of the model that it shipped.
MODEL_CONFIG = {
    **{"n_encoder_layer": 20, "n_decoder_layer": 10, "n_embd": 1024, "qkv_embd": 384, "hidden_dim": 4096},
    **{"n_head": 6, "n_kv_head": 3, "is_interleaved": False, "vocab_size": 32128, "pad_token_id": 0},
    **{"block_size": 1024, "rope_theta": 10000.0, "rope_factor": 1.0, "dropout": 0.1},
}
LOWEST = {"pad_token_id": 0, "rope_factor": 0, "dropout": 0}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VISION_WEIGHTS = ("vision_tower.", "mm_projector.", "image_newline")
BLOCK_WEIGHT = re.compile(r"transformer\.([eh])\.([0-9]+)\.(?:ln[123]|attn|causal_attn|cross_attn|mlp)\.")
# A size, the weights whose shapes tell it, and on which axis.
TELLING_WEIGHTS = {
    "vocab_size": (("transformer.wte.weight", "lm_head.weight"), 0),
    "n_embd": ((".q_linear.weight", ".fc1.weight", "transformer.wte.weight"), 1),
    "hidden_dim": ((".mlp.fc1.weight",), 0),
    "qkv_embd": ((".q_linear.weight",), 0),
    "key_value_width": ((".k_linear.weight", ".v_linear.weight"), 0),
}


def read_reference_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Weights under the predecessor's names, all of one dtype, and the config in the file, unchecked, or `None`.

    Nothing else of the file is used, and nothing that it pickles is executed.

    Args:
        path (`Path`): From [`reference_checkpoint_file`].

    Raises:
        ValueError: The file is damaged or pickles more than tensors and plain values.
    """
    loaded, stored = _load(path), None
    if isinstance(loaded, Mapping) and "model_state_dict" in loaded:
        loaded, stored = loaded["model_state_dict"], loaded.get("model_config")
    if not _is_state_dict(loaded):
        raise ValueError(
            f"{str(path)!r} holds {_kind(loaded)}, but a checkpoint holds named tensors, alone or as its "
            "`model_state_dict`. Give the `model.pt` that the predecessor's trainer wrote."
        )
    _check_tensors(loaded, path)
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in loaded.values()})
    # A tied table that is stored transposed could not be saved as it is.
    return {key: tensor.to(dtype).contiguous() for key, tensor in loaded.items()}, stored


def is_vision_checkpoint(weights: Iterable[str]) -> bool:
    """Whether these are names of weights of the predecessor's vision-language model."""
    return any(key.startswith(VISION_WEIGHTS) for key in weights)


def told_model_config(
    weights: Mapping[str, torch.Tensor], stored: Any, given: Mapping[str, Any] | None, path: Path
) -> dict[str, Any]:
    """The `MuConfig` that the weights of a text model belong to, told by their shapes and by what is stated.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Of the text model, under the predecessor's names.
        stored (`Any`): What the checkpoint states.
        given (`Mapping[str, Any]`, *optional*): Fields of `MuConfig` that the checkpoint does not state.
        path (`Path`): For messages.

    Raises:
        ValueError: The weights are not those of the text model, or `stored`, `given` and the shapes contradict each
            other.
    """
    stated = _stated_model_config(stored, given)
    sizes = _sizes(weights)
    complete = {**MODEL_CONFIG, **stated, **{name: size for name, size in sizes.items() if size is not None}}
    complete |= _heads(sizes, stated, path)
    flaws = [
        f"{name}: the shapes say {size}, the config says {stated[name]}"
        for name, size in sizes.items()
        if name not in ("qkv_embd", "key_value_width") and size is not None and stated.get(name, size) != size
    ]
    flaws += _contradicting_heads(complete, stated)
    flaws += _differences(weights, complete, stated)
    if flaws:
        raise ValueError(
            f"{str(path)!r} is no text model of the predecessor: {'; '.join(flaws)}. Give a checkpoint as its trainer "
            "wrote it; if only the config is wrong, correct it in the file."
        )
    complete.pop("key_value_width")
    return complete


def reference_checkpoint_file(path: Path) -> Path:
    """The file that `path` is, or the one checkpoint in the folder that it is.

    Args:
        path (`Path`): A file, or a folder with exactly one `model.pt`, `model_*.pt` or `pytorch_model.bin`.

    Raises:
        ValueError: There is no such file, or more than one of them.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"There is no file or folder {str(path)!r}. Give the path of the predecessor's `model.pt`.")
    names = ("model.pt", "model_*.pt", "pytorch_model.bin")
    files = sorted({file for name in names for file in path.glob(name) if file.is_file()})
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} checkpoints ({listed(file.name for file in files)})" if files else "no checkpoint"
    raise ValueError(
        f"The folder {str(path)!r} holds {found}, but exactly one `model.pt`, `model_*.pt` or `pytorch_model.bin` is "
        "converted. Give the path of the file itself."
    )


def _load(path):
    with open(path, "rb") as opened:
        if opened.read(20).startswith(b"version https://git-"):
            raise ValueError(
                f"{str(path)!r} is a Git LFS pointer, but the weights themselves are needed. Run `git lfs pull`."
            )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                    raise zipfile.BadZipFile("its entries are larger than itself")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file raises whatever it likes
        raise ValueError(
            f"{str(path)!r} could not be read ({_reason(error)}), but must be a whole file by `torch.save` of nothing "
            "but tensors and plain values; what else it pickles was not executed. Fetch it again, or save its "
            "`model_state_dict` and `model_config` alone."
        ) from error


def _reason(error):
    """What torch found, without its advice to read the file with less care."""
    if found := re.search(r"GLOBAL \S+|Unsupported operand \d+", str(error)):
        return found[0].replace("GLOBAL", "it pickles")
    line = next(iter(str(error).splitlines()), "")
    return type(error).__name__ if not line or "weights_only" in line else line[:200]


def _is_state_dict(loaded):
    return (
        isinstance(loaded, Mapping)
        and len(loaded) > 0
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items())
    )


def _kind(loaded):
    if isinstance(loaded, Mapping) and loaded:
        return f"a mapping with {listed(f'{key!r}: {type(value).__name__}' for key, value in loaded.items())}"
    return f"an empty {type(loaded).__name__}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"


def _check_tensors(weights, path):
    flaws = {key: flaw for key, tensor in weights.items() if (flaw := _flaw(tensor))}
    if not flaws:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in weights.values()}
        present = sum(storage.nbytes() for storage in storages.values())
        # The predecessor's output head is its embedding table.
        claimed = sum(tensor.nbytes for key, tensor in weights.items() if key != "lm_head.weight")
        if claimed > present:
            flaws = {"all tensors together": f"claims {claimed:,} bytes of the {present:,} that there are"}
    if not flaws:
        flaws = {key: "holds NaN or infinity" for key, tensor in weights.items() if not tensor.isfinite().all()}
    if flaws:
        raise ValueError(
            f"{str(path)!r} holds tensors that are no weights: "
            f"{listed(f'{key!r} {flaw}' for key, flaw in flaws.items())}. Plain floating-point tensors with their "
            "data and without NaN are needed. Give a checkpoint as the predecessor's trainer wrote it."
        )


def _flaw(tensor):
    """Why a tensor is no weight, or `None`."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_nested or tensor.layout != torch.strided:
        return f"is a {type(tensor).__name__} of layout {tensor.layout}"
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        return f"is of {tensor.dtype} on the device {tensor.device}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"claims the shape {tuple(tensor.shape)} with {tensor.untyped_storage().nbytes():,} bytes of data"
    return None


def _stated_model_config(stored, given):
    """What a checkpoint and the caller say of the model, which must not contradict each other."""
    stored = _checked_model_config(stored, "The `model_config` in the checkpoint")
    given = _checked_model_config(given, "The argument `model_config`")
    differing = [name for name in stored if name in given and stored[name] != given[name]]
    if differing:
        contradictions = listed(f"{name} is {given[name]} and there {stored[name]}" for name in differing)
        raise ValueError(
            f"The argument `model_config` contradicts the one in the checkpoint: {contradictions}. It is for "
            "checkpoints that carry none: leave it out."
        )
    return {**stored, **given}


def _checked_model_config(model_config, origin):
    if model_config is None:
        return {}
    if not isinstance(model_config, Mapping):
        raise ValueError(f"{origin} is {_kind(model_config)}, but must map names to values. Correct or remove it.")
    wrong = [f"{name!r}: {value!r}" for name, value in model_config.items() if not _is_allowed(name, value)]
    if wrong:
        raise ValueError(
            f"{origin} has {listed(wrong)}, but must have fields of the predecessor's `MuConfig` "
            f"({', '.join(MODEL_CONFIG)}): sizes of at least 1, `rope_factor` and `dropout` of at least 0, "
            "`is_interleaved` True or False. Correct or remove these."
        )
    return dict(model_config)


def _is_allowed(name, value):
    if not isinstance(name, str) or name not in MODEL_CONFIG:
        return False
    if name == "is_interleaved":
        return isinstance(value, bool)
    if name == "qkv_embd" and value is None:
        return True
    kinds = (int, float) if isinstance(MODEL_CONFIG[name], float) else int
    return isinstance(value, kinds) and not isinstance(value, bool) and LOWEST.get(name, 1) <= value < 1e12


def _sizes(weights):
    """What most shapes say of `MuConfig` and of `key_value_width`; `None` where no weight tells."""
    sizes = {}
    for name, (suffixes, axis) in TELLING_WEIGHTS.items():
        telling = (tensor for key, tensor in weights.items() if key.endswith(suffixes))
        found = Counter(tensor.shape[axis] for tensor in telling if tensor.dim() == 2 and tensor.numel())
        sizes[name] = found.most_common(1)[0][0] if found else None
    blocks = {match.groups() for match in map(BLOCK_WEIGHT.match, weights) if match}
    depths = Counter(stack for stack, _ in blocks)
    return {**sizes, "n_encoder_layer": depths["e"] or None, "n_decoder_layer": depths["h"] or None}


def _heads(sizes, stated, path):
    """`n_head`, `n_kv_head` and both widths, stated or told by what else is known."""
    query, key_value = sizes["qkv_embd"], sizes["key_value_width"]
    if query is None or key_value is None:
        raise ValueError(
            f"{str(path)!r} is no text model of the predecessor: it has no `*.q_linear.weight` or no "
            "`*.k_linear.weight`. Give the `model.pt` that the predecessor's trainer wrote."
        )
    num_heads = stated.get("n_head")
    if num_heads is None and (query, key_value) == (384, 192):
        num_heads = MODEL_CONFIG["n_head"]
    if num_heads is None:
        raise ValueError(
            f"{str(path)!r} does not say how many heads share its queries of width {query} and keys of width "
            f"{key_value}, and shapes cannot tell. Pass "
            '`model_config={"n_head": ..., "n_kv_head": ..., "is_interleaved": ...}`.'
        )
    num_key_value_heads = stated.get("n_kv_head") or max(key_value * num_heads // query, 1)
    return {"n_head": num_heads, "n_kv_head": num_key_value_heads}


def _contradicting_heads(complete, stated):
    num_heads, num_key_value_heads = complete["n_head"], complete["n_kv_head"]
    query, key_value = complete["qkv_embd"], complete["key_value_width"]
    if "qkv_embd" in stated:
        stated_width = (stated["qkv_embd"] or complete["n_embd"]) // num_heads * num_heads
        if stated_width != query:
            return [f"qkv_embd: the shapes say {query}, the config says {stated['qkv_embd']} for {num_heads} heads"]
    if query != query // num_heads * num_heads:
        return [f"n_head: the shapes say queries of width {query}, the config says {num_heads} heads"]
    if key_value != num_key_value_heads * (query // num_heads):
        return [
            f"n_kv_head: the shapes say keys of width {key_value}, the config says {num_key_value_heads} heads of "
            f"width {query // num_heads}"
        ]
    return []


def check_weights_fit(weights: Mapping[str, torch.Tensor], needed: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuses weights under this family's names that are not those of a model.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Converted.
        needed (`Mapping[str, torch.Tensor]`): The model's state dict.
        path (`Path`): For messages.

    Raises:
        ValueError: Weights are missing, left over or of another shape; all of them are listed.
    """
    flaws = _listed_differences(weights, {key: tuple(tensor.shape) for key, tensor in needed.items()})
    if flaws:
        raise ValueError(
            f"{str(path)!r} is no model of the predecessor: of the weights, in this family's names, "
            f"{'; '.join(flaws)}. Give a checkpoint as its trainer wrote it."
        )


def _listed_differences(weights, expected):
    missing = [repr(key) for key in expected if key not in weights]
    extra = [repr(key) for key in weights if key not in expected]
    misshaped = [
        f"{key!r} {tuple(weights[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in weights and tuple(weights[key].shape) != shape
    ]
    kinds = {"missing": missing, "left over": extra, "of another shape": misshaped}
    return [f"{len(keys):,} {kind}: {listed(keys)}" for kind, keys in kinds.items() if keys]


def _differences(weights, complete, stated):
    """Which weights are missing, left over, of another shape or not tied, each kind as one sentence."""
    # One block more than there are shows what is missing; a config may claim any number of them.
    depths = {
        name: min(stated.get(name, complete[name]), complete[name] + 1)
        for name in ("n_encoder_layer", "n_decoder_layer")
    }
    flaws = _listed_differences(weights, _shapes({**complete, **depths}))
    if not flaws and not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        flaws = ["'lm_head.weight' differs from 'transformer.wte.weight', which it shares there"]
    return flaws


def _shapes(sizes):
    """The names and shapes of the weights of a text model."""
    width, vocab_size = sizes["n_embd"], sizes["vocab_size"]
    shapes = {"transformer.wte.weight": (vocab_size, width), "lm_head.weight": (vocab_size, width)}
    shapes |= {"transformer.ln_e.weight": (width,), "transformer.ln_f.weight": (width,)}
    attentions = {"e": ("attn",), "h": ("causal_attn", "cross_attn")}
    for stack, depth in {"e": sizes["n_encoder_layer"], "h": sizes["n_decoder_layer"]}.items():
        block = _block_shapes(attentions[stack], sizes)
        for index in range(depth):
            shapes |= {f"transformer.{stack}.{index}.{name}": shape for name, shape in block.items()}
    return shapes


def _block_shapes(attentions, sizes):
    width, inner, query, key_value = (sizes[name] for name in ("n_embd", "hidden_dim", "qkv_embd", "key_value_width"))
    linears = {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for name in attentions:
        linears |= {f"{name}.q_linear": (query, width), f"{name}.k_linear": (key_value, width)}
        linears |= {f"{name}.v_linear": (key_value, width), f"{name}.out_linear": (width, query)}
    shapes = {f"ln{index + 1}.weight": (width,) for index in range(len(attentions) + 1)}
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes
