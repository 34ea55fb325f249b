# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints of microsoft/encoder-decoder-slm ("the original") to folders of this family."""

import functools
import json
import math
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, PreTrainedTokenizerBase

from .checkpoints import write_folder
from .configuration_encdec_slm import EncDecSLMConfig
from .configuration_encdec_vlm import EncDecVLMConfig
from .conversion_tokenizers import add_image_token, load_reference_tokenizer
from .errors import format_list, summarize_error
from .image_processing_encdec_vlm import EncDecVLMImageProcessor
from .modeling_encdec_slm import EncDecSLMForConditionalGeneration
from .modeling_encdec_vlm import EncDecVLMForConditionalGeneration
from .processing_encdec_vlm import EncDecVLMProcessor


QUESTION_ANSWERING_PROMPT = (
    "Answer the following question based only on the context.\n"
    "###Question\n{question}\n###Context\n{context}\n###Answer\n"
)
# The original `MuConfig` with its defaults, the sizes of the released text model.
MODEL_CONFIG = {
    **{"n_encoder_layer": 20, "n_decoder_layer": 10, "n_embd": 1024, "qkv_embd": 384, "hidden_dim": 4096},
    **{"n_head": 6, "n_kv_head": 3, "is_interleaved": False, "vocab_size": 32128, "pad_token_id": 0},
    **{"block_size": 1024, "rope_theta": 10000.0, "rope_factor": 1.0, "dropout": 0.1},
}
MAY_BE_ZERO = ("is_interleaved", "pad_token_id", "rope_factor", "dropout")
# Applied in order; the original blocks are `e` in the encoder and `h` in the decoder.
TOWER = "vision_tower.vision_tower.vision_model."
RENAMINGS = (
    (r"^transformer\.wte\.", "model.encoder.embed_tokens."),
    (r"^transformer\.e\.", "model.encoder.layers."),
    (r"^transformer\.h\.", "model.decoder.layers."),
    (r"^transformer\.ln_e\.", "model.encoder.norm."),
    (r"^transformer\.ln_f\.", "model.decoder.norm."),
    (r"(encoder\.layers\.\d+)\.ln2\.", r"\1.post_attention_layernorm."),
    (r"\.ln1\.", ".input_layernorm."),
    (r"\.ln2\.", ".pre_cross_attn_layernorm."),
    (r"\.ln3\.", ".post_attention_layernorm."),
    (r"\.(attn|causal_attn)\.", ".self_attn."),
    (r"\.out_linear\.", ".o_proj."),
    (r"\.([qkv])_linear\.", r".\1_proj."),
    (r"\.fc1\.", ".up_proj."),
    (r"\.fc2\.", ".down_proj."),
)
VISION_RENAMINGS = (
    (re.escape(TOWER), "model.encoder.vision_tower."),
    (r"^mm_projector\.0\.", "model.encoder.multi_modal_projector.linear_1."),
    (r"^mm_projector\.2\.", "model.encoder.multi_modal_projector.linear_2."),
    (r"^image_newline$", "model.encoder.image_newline"),
)
VISION_WEIGHTS = ("vision_tower.", "mm_projector.", "image_newline")
# Fields of the original vision config that have one value in the released model, and code for others.
VISION_FIELDS = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_resampler_type": None,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "use_vision_cross_attn": False,
    "cross_image_pos_embed": False,
    "use_pos_skipping": False,
    "rope_factor": 1.0,
}
CLIP_HEAD_DIM = 64
# Where trainers put the weights in a file, and what wrappers of modules (DDP, `torch.compile`, FSDP, activation
# checkpointing) put into the names of weights.
STATE_DICT_KEYS = ("model_state_dict", "state_dict", "model", "module")
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
FIRST_WEIGHT = "transformer.wte.weight"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def question_answering_prompt(question: str, context: str) -> str:
    """Return the source text that the released text model was trained to answer.

    Args:
        question (`str`): One question.
        context (`str`): The text that contains the answer.
    """
    return QUESTION_ANSWERING_PROMPT.format(question=question, context=context)


def convert_reference_checkpoint(
    path: str | Path,
    output_dir: str | Path,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    model_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint of microsoft/encoder-decoder-slm to a folder that computes the same, up to rounding.

    Two things differ:

    - Positions whose keys are all padding (all of them if a source is nothing but padding, the first ones if a target
      begins with padding): the original attends evenly to all keys, as eager attention does here; other backends
      differ.
    - `rope_factor` above 1, beyond `block_size` tokens: with a cache, keys keep the rotation that they were computed
      with, while the original rotates all of them again for every token; `use_cache=False` does the same. After a
      longer call, its frequencies are used until a call is shorter than `block_size`.

    Args:
        path (`str` or `Path`): The original `model.pt`, its vision-language `pytorch_model.bin` with a
            `config.json` beside it, or a folder with exactly one of them. Nothing pickled in it is executed. Prefixes
            that DDP, FSDP and `torch.compile` add to names are removed, and weights are found in training states
            such as `{"model": ..., "optimizer": ...}`.
        output_dir (`str` or `Path`): Folder to write, atomically.
        tokenizer (`str`, `Path` or [`~transformers.PreTrainedTokenizerBase`], *optional*): A folder or a repository on
            the Hub with a `tokenizer.json`, or a tokenizer in memory. `None` uses the one beside the checkpoint; if
            there is none, the model has no tokenizer.
        model_config (`Mapping[str, Any]`, *optional*): Fields of the original `MuConfig`, for a checkpoint
            without one: `n_head`, `n_kv_head` and `is_interleaved` do not follow from the weights. Its `vision_config`
            holds fields of the vision tower.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an earlier checkpoint in `output_dir`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: `path` is no such checkpoint, is damaged, or pickles code; weights are missing, unexpected or of
            another shape; `tokenizer` has no `tokenizer.json` or does not fit the vocabulary; `output_dir` is not
            empty and `overwrite` is `False`, or contains the checkpoint.
        TypeError: `tokenizer` is something else.
    """
    file = _find_file(Path(path))
    with write_folder(output_dir, overwrite=overwrite, sources=[file]) as folder:
        weights, stored = _read_checkpoint(file)
        is_vision = any(name.startswith(VISION_WEIGHTS) for name in weights)
        convert = _convert_vision_model if is_vision else _convert_text_model
        convert(weights, stored, dict(model_config or {}), tokenizer, file, folder)
    return Path(output_dir)


def _convert_text_model(weights, stored, given, tokenizer, file, folder):
    mu_config = _complete_model_config(weights, stored, given, file)
    tokenizer = load_reference_tokenizer(tokenizer, file.parent, mu_config)
    config = _build_config(mu_config, tokenizer, file)
    converted = convert_reference_state_dict(weights, config, mu_config["is_interleaved"])
    _save_model(converted, EncDecSLMForConditionalGeneration, config, folder, file)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _convert_vision_model(weights, stored, given, tokenizer, file, folder):
    fields = _read_vision_config(file)
    vision_config = given.pop("vision_config", None) or fields.get("vision_config") or {}
    # Its query heads are grouped as here, and its attention is as wide as the model.
    stated = {name: fields[name] for name in MODEL_CONFIG if name in fields}
    mu_config = _complete_model_config(weights, {**stated, "is_interleaved": True, "qkv_embd": None}, given, file)
    tokenizer = load_reference_tokenizer(tokenizer, file.parent, mu_config)
    image_token_id = add_image_token(tokenizer, mu_config["vocab_size"])
    pinpoints = fields.get("image_grid_pinpoints")
    config = EncDecVLMConfig(
        text_config=_build_config(mu_config, tokenizer, file, lm_head_bias=True),
        vision_config=_build_tower_config(weights, vision_config),
        image_token_id=image_token_id,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        # In the original they are (width, height).
        image_grid_pinpoints=None if pinpoints is None else [[height, width] for width, height in pinpoints],
        max_num_tiles=int(fields.get("image_aspect_ratio", "anyres_max_3").rpartition("_")[2]),
    )
    converted = convert_vision_state_dict(weights, config)
    _save_model(converted, EncDecVLMForConditionalGeneration, config, folder, file)
    if tokenizer is not None:
        EncDecVLMProcessor(EncDecVLMImageProcessor.from_config(config), tokenizer).save_pretrained(folder)


def _save_model(weights, model_class, config, folder, file):
    with torch.device("meta"):
        model = model_class(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"The weights of {str(file)!r} do not fit a model of its sizes; in the names of this family: "
            f"{summarize_error(error)}. Give a checkpoint as the trainer of microsoft/encoder-decoder-slm saved it."
        ) from error
    model.tie_weights()
    model.save_pretrained(folder)


# Files


def _find_file(path):
    """Return the file that `path` is, or the only checkpoint in the folder that it is."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"There is no file or folder {str(path)!r}. Give the path of the original `model.pt`.")
    names = ("model.pt", "model_*.pt", "pytorch_model.bin")
    files = sorted({file for name in names for file in path.glob(name) if file.is_file()})
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} checkpoints ({format_list(file.name for file in files)})" if files else "no checkpoint"
    raise ValueError(
        f"The folder {str(path)!r} has {found}, but exactly one of {', '.join(names)} is required. Give the path of "
        "the file."
    )


def _read_checkpoint(file: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Read weights under the original names, in one dtype, and the config in the file, which may be `None`."""
    loaded, stored = _load(file), None
    while isinstance(loaded, Mapping) and (key := next((key for key in STATE_DICT_KEYS if key in loaded), None)):
        stored = loaded.get("model_config", stored)
        loaded = loaded[key]
    weights = _remove_prefixes(loaded)
    if flaws := _find_flaws(weights, os.path.getsize(file)):
        raise ValueError(
            f"{str(file)!r} has no usable weights: {format_list(flaws)}. Dense floating-point tensors without NaN are "
            "required. Give a checkpoint as the trainer of microsoft/encoder-decoder-slm saved it."
        )
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()})
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}, stored


def _load(file):
    with open(file, "rb") as opened:
        if opened.read(20).startswith(b"version https://git-"):
            raise ValueError(f"{str(file)!r} is a Git LFS pointer without the weights. Run `git lfs pull`.")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(file):
                    raise zipfile.BadZipFile("its entries are larger than the file")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and hostile files raise errors of many kinds
        found = re.search(r"GLOBAL \S+|Unsupported operand \d+", str(error))
        # torch's message advises to load the file with `weights_only=False`.
        reason = (
            found[0] if found else type(error).__name__ if "weights_only" in str(error) else summarize_error(error)
        )
        raise ValueError(
            f"{str(file)!r} could not be read ({reason}). A complete file by `torch.save` with only tensors and plain "
            "values is required; anything else was not executed. Download it again, or save only 'model_state_dict' "
            "and 'model_config'."
        ) from error


def _remove_prefixes(loaded):
    """Remove from the names of weights what wrappers of modules, and models around the model, add to them."""
    if not isinstance(loaded, Mapping):
        return {}
    weights = {}
    for name, tensor in loaded.items():
        name = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if name != "n_averaged":  # of `torch.optim.swa_utils.AveragedModel`
            weights[name] = tensor if name not in weights else None
    prefix = next((name.removesuffix(FIRST_WEIGHT) for name in weights if name.endswith(FIRST_WEIGHT)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _find_flaws(weights, file_bytes):
    """Return what `torch.load` accepts and no model has, each as `"name problem"`."""
    if missing := [name for name in (FIRST_WEIGHT, "lm_head.weight") if name not in weights]:
        return [f"{name} is missing" for name in missing]
    flaws = [f"{name} is {_describe(value)}" for name, value in weights.items() if not _is_dense(value)]
    if flaws:
        return flaws
    # Strides of 0 and shared memory let a small file claim tensors of any size. The head is the embedding table.
    claimed = sum(tensor.nbytes for name, tensor in weights.items() if name != "lm_head.weight")
    if claimed > file_bytes:
        return [f"the tensors claim {claimed:,} bytes, the file has {file_bytes:,}"]
    if not torch.equal(weights["lm_head.weight"], weights[FIRST_WEIGHT]):
        return [f"lm_head.weight differs from {FIRST_WEIGHT}"]
    return [f"{name} has NaN or infinity" for name, tensor in weights.items() if not tensor.isfinite().all()]


def _is_dense(value):
    is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
    return is_plain and not value.is_nested and value.device.type == "cpu" and value.dtype in DTYPES


def _describe(value):
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}" if value is not None else "given twice"
    return f"a {type(value).__name__} of {value.dtype} and {value.layout} on {value.device}"


# Configs


def _complete_model_config(weights, stored, given, file) -> dict[str, Any]:
    """Return the `MuConfig` that the shapes of weights, the checkpoint and the caller agree on."""
    _check_model_config(stored := stored or {}, f"`model_config` in {str(file)!r}")
    _check_model_config(given, "The argument `model_config`")
    sizes, key_width = _read_sizes(weights, file)
    stated = {**stored, **given}
    if stated.get("qkv_embd", 0) is None:
        stated["qkv_embd"] = sizes["n_embd"]
    if "n_head" not in stated and (sizes["qkv_embd"], key_width) != (384, 192):  # the released sizes
        raise ValueError(
            f"{str(file)!r} does not state the number of heads, which the weights do not show for queries of width "
            f"{sizes['qkv_embd']} and keys of width {key_width}. Pass "
            '`model_config={"n_head": ..., "n_kv_head": ..., "is_interleaved": ...}`.'
        )
    known = [(name, stored[name], given[name]) for name in stored if name in given]
    known += [(name, stated[name], size) for name, size in sizes.items() if name in stated]
    if problems := [f"{name} is {value} and {other}" for name, value, other in known if value != other]:
        raise ValueError(
            f"The sizes of {str(file)!r}, its `model_config` and the argument contradict each other: "
            f"{'; '.join(problems)}. Correct the config in the file or the argument."
        )
    complete = {**MODEL_CONFIG, **stated, **sizes}
    num_key_value_heads = max(key_width * complete["n_head"] // sizes["qkv_embd"], 1)
    return {**complete, "n_kv_head": stated.get("n_kv_head", num_key_value_heads)}


def _check_model_config(model_config, origin):
    if not isinstance(model_config, Mapping):
        raise ValueError(f"{origin} is a {type(model_config).__name__}, but must be a mapping of names to values.")
    wrong = [f"{name!r}: {value!r}" for name, value in model_config.items() if not _is_valid(name, value)]
    if wrong:
        raise ValueError(
            f"{origin} has {format_list(wrong)}, but must have fields of the original `MuConfig` "
            f"({', '.join(MODEL_CONFIG)}) with values of their kind. Correct or remove these."
        )


def _is_valid(name, value):
    if name not in MODEL_CONFIG or (name == "qkv_embd" and value is None):
        return name in MODEL_CONFIG
    kind = (int, float) if isinstance(MODEL_CONFIG[name], float) else type(MODEL_CONFIG[name])
    return isinstance(value, kind) and (0 if name in MAY_BE_ZERO else 1) <= value < 1e12


def _read_sizes(weights, file):
    """Return the fields of `MuConfig` that shapes of weights show, and the width of keys."""
    block = "transformer.e.0"
    try:
        vocab_size, width = weights[FIRST_WEIGHT].shape
        query_width, key_width = (weights[f"{block}.attn.{name}_linear.weight"].shape[0] for name in "qk")
        inner_width = weights[f"{block}.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{str(file)!r} is not a model of microsoft/encoder-decoder-slm: {summarize_error(error)} is missing or "
            "has another shape. Give the `model.pt` that its trainer saved."
        ) from error
    blocks = {match.groups() for match in map(re.compile(r"transformer\.([eh])\.(\d+)\.").match, weights) if match}
    depths = Counter(stack for stack, _ in blocks)
    sizes = {"vocab_size": vocab_size, "n_embd": width, "hidden_dim": inner_width, "qkv_embd": query_width}
    return {**sizes, "n_encoder_layer": depths["e"], "n_decoder_layer": depths["h"]}, key_width


def reference_config(model_config: Mapping[str, Any], **kwargs) -> EncDecSLMConfig:
    """Return the config that computes what an original text config computes.

    Args:
        model_config (`Mapping[str, Any]`): The original `MuConfig`. `is_interleaved` changes only the weights,
            see [`convert_reference_state_dict`]. A `rope_factor` above 1 becomes transformers' `"dynamic"` rotary
            embedding, see [`convert_reference_checkpoint`].
        kwargs: Further fields of [`EncDecSLMConfig`], such as `eos_token_id`.

    Raises:
        ValueError: `rope_factor` is above 1 and heads have a width of 2.
    """
    head_dim = (model_config["qkv_embd"] or model_config["n_embd"]) // model_config["n_head"]
    rope_parameters = {"rope_type": "default", "rope_theta": float(model_config["rope_theta"])}
    if model_config["rope_factor"] > 1:
        if head_dim == 2:
            raise ValueError(
                f"`rope_factor` is {model_config['rope_factor']}, but cannot be above 1 for heads of width 2: its "
                "exponent is d / (d - 2). Set it to 1.0, or give wider heads."
            )
        rope_parameters |= {"rope_type": "dynamic", "factor": float(model_config["rope_factor"])}
    return EncDecSLMConfig(
        vocab_size=model_config["vocab_size"],
        hidden_size=model_config["n_embd"],
        intermediate_size=model_config["hidden_dim"],
        num_attention_heads=model_config["n_head"],
        num_key_value_heads=model_config["n_kv_head"],
        head_dim=head_dim,
        encoder_num_hidden_layers=model_config["n_encoder_layer"],
        decoder_num_hidden_layers=model_config["n_decoder_layer"],
        hidden_act="gelu_pytorch_tanh",
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=rope_parameters,
        max_position_embeddings=model_config["block_size"],
        attention_dropout=model_config["dropout"],
        mlp_dropout=model_config["dropout"],
        pad_token_id=model_config["pad_token_id"],
        **kwargs,
    )


def _build_config(mu_config, tokenizer, file, **kwargs):
    bos_token_id, eos_token_id = 1, 32000 if mu_config["vocab_size"] > 32000 else None
    if tokenizer is not None:
        bos_token_id = bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        eos_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    token_ids = {"bos_token_id": bos_token_id, "decoder_start_token_id": bos_token_id, "eos_token_id": eos_token_id}
    try:
        return reference_config(mu_config, **token_ids, **kwargs)
    except StrictDataclassError as error:
        raise ValueError(
            f"The sizes of {str(file)!r} do not make a model: {error.__cause__ or error} Correct its `model_config`."
        ) from error


def _read_vision_config(file: Path) -> dict[str, Any]:
    """Read the `config.json` beside a vision checkpoint; refuse features that the released model does not use."""
    path = file.parent / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(file)!r} is a vision-language model, but there is no readable `config.json` beside it "
            f"({summarize_error(error)}). Put the original file there."
        ) from error
    others = [name for name, value in VISION_FIELDS.items() if fields.get(name, value) != value]
    if not re.fullmatch(r"anyres_max_[1-9][0-9]*", str(fields.get("image_aspect_ratio", "anyres_max_3"))):
        others.append("image_aspect_ratio")
    pinpoints = fields.get("image_grid_pinpoints", [])
    if not isinstance(pinpoints, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pinpoints):
        others.append("image_grid_pinpoints")
    if not isinstance(fields.get("mm_vision_select_layer", -2), int):
        others.append("mm_vision_select_layer")
    if others:
        raise ValueError(
            f"{str(path)!r} has {', '.join(f'{name} {fields[name]!r}' for name in others)}, which is not supported. "
            "Give the config of the released model."
        )
    return fields


def _build_tower_config(weights, given):
    """Return the config of the vision tower: sizes from shapes, heads of width 64 as in OpenAI's CLIP unless given."""
    try:
        width = weights[f"{TOWER}embeddings.class_embedding"].shape[0]
        patch_size = weights[f"{TOWER}embeddings.patch_embedding.weight"].shape[-1]
        num_positions = weights[f"{TOWER}embeddings.position_embedding.weight"].shape[0]
        inner_width = weights[f"{TOWER}encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"The checkpoint has no complete vision tower: {error} is missing or has another shape. Give a complete "
            "checkpoint, not a projector alone."
        ) from error
    if "num_attention_heads" not in given and width % CLIP_HEAD_DIM:
        raise ValueError(
            f"The weights do not show the number of heads of the vision tower of width {width}. Pass "
            '`model_config={"vision_config": {"num_attention_heads": ...}}`.'
        )
    sizes = {
        "hidden_size": width,
        "intermediate_size": inner_width,
        "num_hidden_layers": len(
            {name.split(".")[5] for name in weights if name.startswith(f"{TOWER}encoder.layers.")}
        ),
        "num_attention_heads": width // CLIP_HEAD_DIM,
        "patch_size": patch_size,
        "image_size": patch_size * math.isqrt(num_positions - 1),
    }
    return CLIPVisionConfig(**{**sizes, **given})


# Weights


def convert_reference_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: EncDecSLMConfig, is_interleaved: bool = False
) -> dict[str, torch.Tensor]:
    """Convert weights of the original text model to those of `EncDecSLMForConditionalGeneration(config)`.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Weights under the original names.
        config ([`EncDecSLMConfig`]): From [`reference_config`].
        is_interleaved (`bool`, *optional*, defaults to `False`): Whether query head h reads key/value head
            `h // (num_attention_heads // num_key_value_heads)`, as in this family. Otherwise it reads
            `h % num_key_value_heads`, and the query heads are reordered.
    """
    converted = {}
    for name, tensor in state_dict.items():
        name = _rename(name, RENAMINGS)
        if not is_interleaved and (".q_proj." in name or name.endswith(".o_proj.weight")):
            tensor = _group_query_heads(tensor, config, dim=1 if ".o_proj." in name else 0)
        converted[name] = tensor
    return converted


def convert_vision_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: EncDecVLMConfig
) -> dict[str, torch.Tensor]:
    """Convert weights of the original vision model to those of `EncDecVLMForConditionalGeneration(config)`.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Weights under the original names.
        config ([`EncDecVLMConfig`]): Of the model.
    """
    text = {name: tensor for name, tensor in state_dict.items() if name.startswith(("transformer.", "lm_head."))}
    rest = {_rename(name, VISION_RENAMINGS): state_dict[name] for name in state_dict if name not in text}
    text = convert_reference_state_dict(text, config.text_config, is_interleaved=True)
    moved = {name.replace("model.encoder.", "model.encoder.text_model."): tensor for name, tensor in text.items()}
    return {**moved, **rest}


def _rename(name, renamings):
    for pattern, replacement in renamings:
        name = re.sub(pattern, replacement, name)
    return name


def _group_query_heads(tensor, config, dim):
    """Move query heads that share a key/value head side by side along `dim`; other shapes are left to be refused."""
    groups = config.num_attention_heads // config.num_key_value_heads
    heads = (groups, config.num_key_value_heads, config.head_dim)
    if tensor.dim() <= dim or tensor.shape[dim] != math.prod(heads):
        return tensor
    return tensor.unflatten(dim, heads).transpose(dim, dim + 1).flatten(dim, dim + 2).contiguous()


__all__ = [
    "QUESTION_ANSWERING_PROMPT",
    "convert_reference_checkpoint",
    "convert_reference_state_dict",
    "convert_vision_state_dict",
    "question_answering_prompt",
    "reference_config",
]
