# SPDX-License-Identifier: Apache-2.0
"""The predecessor's checkpoints (microsoft/encoder-decoder-slm) as folders of this family."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from .checkpoint_folders import TOKENIZER_FILES, folder_written_whole, local_folder
from .configuration_encdec_slm import EncDecSLMConfig
from .conversion_vision import TEXT_FIELDS, convert_vision_tensors, read_vision_config, vision_reference_config
from .hub_cards.cards import converted_card
from .image_processing_encdec_vlm import EncDecVLMImageProcessor
from .modeling_encdec_slm import EncDecSLMForConditionalGeneration
from .modeling_encdec_vlm import EncDecVLMForConditionalGeneration
from .processing_encdec_vlm import IMAGE_TOKEN, EncDecVLMProcessor
from .reference_checkpoints import (
    check_weights_fit,
    is_vision_checkpoint,
    read_reference_checkpoint,
    reference_checkpoint_file,
    told_model_config,
)


logger = logging.get_logger(__name__)

# Applied in order; the predecessor's blocks are `e` in the encoder and `h` in the decoder.
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
QUESTION_ANSWERING_PROMPT = (
    "Answer the following question based only on the context.\n"
    "###Question\n{question}\n###Context\n{context}\n###Answer\n"
)
# The predecessor's pad token is `<unk>`, and so is its place in the vocabulary that of padding.
SPECIAL_TOKENS = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt")
PROBES = ("hello world", "", " ", "  lead", "trail ", "a  b", "\ttab\nline", "é ü 漢字 🙂", "###Answer\n")
PROBES_AROUND_A_TOKEN = ("x{0}y", "{0}  text", " {0} a", "{0}\ntext{0}")


def question_answering_prompt(question: str, context: str) -> str:
    """The source text that the predecessor's released checkpoint was trained to answer.

    Args:
        question (`str`): One question.
        context (`str`): The text that its answer stands in.
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
    """The folder of a Hub-ready model that computes what a checkpoint of the predecessor computes.

    It equals the predecessor up to rounding, but for:

    - Positions whose keys are all padding (every one in a source of nothing else, the first ones in a target that
      begins with it): the predecessor attends evenly to all keys, as eager attention does here; other backends differ.
    - `rope_factor` above 1, beyond `block_size` tokens: with a cache, keys stay as they were turned when they were
      written, while the predecessor turns all of them anew for every token; `use_cache=False` does as it does. And
      after a longer call the frequencies stay those of the longer one until a call is shorter than `block_size`.

    Args:
        path (`str` or `Path`): The predecessor's `model.pt`, its vision-language `pytorch_model.bin` with a
            `config.json` beside it, or a folder with exactly one of them. Nothing that it pickles is executed.
        output_dir (`str` or `Path`): Where the model is to lie; nothing appears there before all of it is written.
        tokenizer (`str`, `Path` or [`~transformers.PreTrainedTokenizerBase`], *optional*): A folder or a Hub
            repository with a `tokenizer.json`, or a tokenizer in memory. Of one that transformers 5 built anew from
            such a folder, the folder is taken. `None` takes the one beside the checkpoint, if one lies there;
            otherwise the model has none.
        model_config (`Mapping[str, Any]`, *optional*): Fields of the predecessor's `MuConfig`, for a checkpoint that
            carries none: `n_head` (and `is_interleaved`) cannot be told by its weights. `vision_config` in it gives
            fields of the tower that shapes do not tell.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a checkpoint that lies in `output_dir`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: `path` is no such checkpoint, is damaged, or wants to execute code; weights are missing, left over
            or of other shapes than the config says; `tokenizer` has no `tokenizer.json` or does not fit the
            vocabulary; `output_dir` is not empty and `overwrite` is `False`.
        TypeError: `tokenizer` is something else.
    """
    path, output_dir = reference_checkpoint_file(Path(path)), Path(output_dir)
    with folder_written_whole(output_dir, overwrite) as folder:
        weights, stored = read_reference_checkpoint(path)
        write = _write_vision_model if is_vision_checkpoint(weights) else _write_text_model
        config, used_tokenizer = write(weights, stored, dict(model_config or {}), tokenizer, path, folder)
        converted_card(
            output_dir.resolve().name,
            config,
            sum(tensor.numel() for name, tensor in weights.items() if name != "lm_head.weight"),
            QUESTION_ANSWERING_PROMPT,
            used_tokenizer is not None,
        ).save(folder / "README.md")
    return output_dir


def _write_text_model(weights, stored, given, tokenizer, path, folder):
    model_config = told_model_config(weights, stored, given, path)
    used_tokenizer = _write_tokenizer(tokenizer, path.parent, model_config, folder)
    config = _config_with_token_ids(model_config, used_tokenizer, path)
    converted = convert_reference_state_dict(weights, config, model_config["is_interleaved"])
    _write_model(converted, EncDecSLMForConditionalGeneration, config, folder, path)
    return config, used_tokenizer


def _write_vision_model(weights, stored, given, tokenizer, path, folder):
    fields = read_vision_config(path)
    vision_config = given.pop("vision_config", fields.get("vision_config"))
    # Its query heads are in order, and there is no width of their own.
    stated = {name: fields[name] for name in TEXT_FIELDS if name in fields} | {
        "is_interleaved": True,
        "qkv_embd": None,
    }
    text_weights = {key: tensor for key, tensor in weights.items() if key.startswith("transformer.")}
    text_weights |= {key: weights[key] for key in ("lm_head.weight",) if key in weights}
    model_config = told_model_config(text_weights, stated, given, path)
    used_tokenizer = _write_tokenizer(tokenizer, path.parent, model_config, folder)
    used_tokenizer, image_token_id = _with_image_token(used_tokenizer, model_config, folder)
    text_config = _config_with_token_ids(model_config, used_tokenizer, path, lm_head_bias=True)
    config = vision_reference_config(text_config, weights, fields, image_token_id, vision_config)
    _write_model(convert_vision_state_dict(weights, config), EncDecVLMForConditionalGeneration, config, folder, path)
    if used_tokenizer is not None:
        processor = EncDecVLMProcessor(EncDecVLMImageProcessor.from_config(config), used_tokenizer)
        processor.save_pretrained(folder)
    return config, used_tokenizer


def convert_vision_state_dict(state_dict: Mapping[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Weights for `EncDecVLMForConditionalGeneration(config)`, from the predecessor's vision-language model.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The predecessor's weights under its own names.
        config ([`EncDecVLMConfig`]): From [`~encdec_slm.conversion_vision.vision_reference_config`].
    """
    text = {key: tensor for key, tensor in state_dict.items() if key.startswith(("transformer.", "lm_head."))}
    text = convert_reference_state_dict(text, config.text_config, is_interleaved=True)
    moved = {key.replace("model.encoder.", "model.encoder.text_model."): tensor for key, tensor in text.items()}
    return {**moved, **convert_vision_tensors(state_dict)}


def _with_image_token(tokenizer, model_config, folder):
    """The tokenizer with a token for images, saved again, and the id of that token."""
    if tokenizer is None:
        return None, model_config["vocab_size"] - 1
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        if len(tokenizer) >= model_config["vocab_size"]:
            raise ValueError(
                f"The tokenizer has {len(tokenizer):,} tokens, as many as the model has embeddings, but images need "
                f"one more ({IMAGE_TOKEN!r}). Give the tokenizer that the model was trained with."
            )
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
        tokenizer.save_pretrained(folder)
    return tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def reference_config(model_config: Mapping[str, Any], **kwargs) -> EncDecSLMConfig:
    """The config of this family that computes what the predecessor's text config computes.

    Args:
        model_config (`Mapping[str, Any]`): The predecessor's `MuConfig` as a mapping. Its `is_interleaved` concerns
            only the weights: see [`convert_reference_state_dict`]. `rope_factor` above 1 becomes transformers'
            `"dynamic"` rotary embedding, which is the same up to `block_size` tokens, and beyond them in a first call
            without a cache: see [`convert_reference_checkpoint`].
        kwargs: Further fields of [`EncDecSLMConfig`], for instance `eos_token_id`.

    Raises:
        ValueError: `rope_factor` is above 1 and heads are 2 wide, which leaves nothing to scale.
    """
    head_dim = (model_config["qkv_embd"] or model_config["n_embd"]) // model_config["n_head"]
    rope_parameters = {"rope_type": "default", "rope_theta": float(model_config["rope_theta"])}
    if model_config["rope_factor"] > 1:
        if head_dim == 2:
            raise ValueError(
                f"`rope_factor` is {model_config['rope_factor']} with heads that are 2 wide, but its scaling has the "
                "exponent d / (d - 2). Set it to 1.0, or give wider heads."
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


def convert_reference_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: EncDecSLMConfig, is_interleaved: bool = False
) -> dict[str, torch.Tensor]:
    """Weights for `EncDecSLMForConditionalGeneration(config)`, from the predecessor's text model.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The predecessor's weights under its own names.
        config ([`EncDecSLMConfig`]): From [`reference_config`].
        is_interleaved (`bool`, *optional*, defaults to `False`): Whether query head h reads key/value head
            `h // (num_attention_heads // num_key_value_heads)`, as here. Otherwise it reads `h % num_key_value_heads`,
            and the query heads are brought into the order in which this makes no difference.
    """
    converted = {}
    for key, tensor in state_dict.items():
        for pattern, replacement in RENAMINGS:
            key = re.sub(pattern, replacement, key)
        if not is_interleaved and (".q_proj." in key or key.endswith(".o_proj.weight")):
            tensor = _group_query_heads(tensor, config, dim=1 if ".o_proj." in key else 0)
        converted[key] = tensor
    return converted


def _group_query_heads(tensor, config, dim):
    """Query heads that share a key/value head, moved side by side along `dim`."""
    groups = config.num_attention_heads // config.num_key_value_heads
    heads = tensor.unflatten(dim, (groups, config.num_key_value_heads, config.head_dim))
    return heads.transpose(dim, dim + 1).flatten(dim, dim + 2).contiguous()


def _config_with_token_ids(model_config, tokenizer, path, **kwargs):
    bos_token_id, eos_token_id = 1, 32000 if model_config["vocab_size"] > 32000 else None
    if tokenizer is not None:
        bos_token_id = tokenizer.get_vocab().get(SPECIAL_TOKENS["bos_token"], bos_token_id)
        eos_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    token_ids = {"bos_token_id": bos_token_id, "decoder_start_token_id": bos_token_id, "eos_token_id": eos_token_id}
    try:
        return reference_config(model_config, **token_ids, **kwargs)
    except StrictDataclassError as error:
        raise ValueError(
            f"The sizes of {str(path)!r} make no model: {error.__cause__ or error} Correct its `model_config`."
        ) from error


def _write_model(weights, model_class, config, folder, path):
    with torch.device("meta"):
        model = model_class(config)
    check_weights_fit(weights, model.state_dict(), path)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)


def _write_tokenizer(tokenizer, checkpoint_folder, model_config, folder):
    """The tokenizer as it loads from `folder` after it was written there; `None` when there is none."""
    if tokenizer is None and not (checkpoint_folder / "tokenizer.json").is_file():
        logger.warning(
            f"No `tokenizer.json` lies in {str(checkpoint_folder)!r} beside the checkpoint, so the converted model "
            "has no tokenizer. Convert it again with `tokenizer=`: the predecessor's is that of "
            "microsoft/Phi-3.5-mini-instruct."
        )
        return None
    if isinstance(tokenizer, PreTrainedTokenizerBase) and type(tokenizer) is not PreTrainedTokenizerFast:
        tokenizer = _files_of_rebuilt(tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.save_pretrained(folder)
    elif isinstance(source := checkpoint_folder if tokenizer is None else tokenizer, (str, Path)):
        _copy_tokenizer_files(local_folder(source, TOKENIZER_FILES), folder)
    else:
        raise TypeError(
            f"`tokenizer` is of type {type(tokenizer).__name__}, but must be the name of a folder or Hub repository, "
            "or a tokenizer of transformers. Give one of these."
        )
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"The tokenizer {_name(tokenizer)} has no `tokenizer.json`, and from other files transformers 5 builds "
            "other tokenizers than the predecessor's. Give a tokenizer that has one."
        )
    return _checked_tokenizer(folder, model_config, _name(tokenizer))


def _name(tokenizer):
    return "beside the checkpoint" if tokenizer is None else repr(getattr(tokenizer, "name_or_path", str(tokenizer)))


def _files_of_rebuilt(tokenizer):
    """The folder that transformers 5 built a tokenizer anew from, since its `tokenizer.json` says what it was."""
    source = Path(tokenizer.name_or_path)
    if (source / "tokenizer.json").is_file():
        return source
    logger.warning(
        f"`tokenizer` is a {type(tokenizer).__name__}, which transformers 5 builds anew instead of reading its "
        "`tokenizer.json`, and is written as it is: its ids can differ from those that the predecessor saw. Give its "
        "folder or name instead."
    )
    return tokenizer


def _copy_tokenizer_files(source, folder):
    root = source.resolve()
    # In the Hub's cache the files of a snapshot are links to its neighbours.
    root = root.parent.parent if root.parent.name == "snapshots" else root
    for file in sorted({file for pattern in TOKENIZER_FILES for file in source.glob(pattern)}):
        if not file.is_file() or file.suffix not in TOKENIZER_SUFFIXES:
            continue
        if not file.resolve().is_relative_to(root):
            raise ValueError(
                f"{str(file)!r} links to a file outside of its folder, which does not belong into a model. Put a copy "
                "in its place."
            )
        shutil.copyfile(file, folder / file.name)


def _checked_tokenizer(folder, model_config, name):
    try:
        original = Tokenizer.from_file(str(folder / "tokenizer.json"))
        _write_special_tokens(folder, original, model_config["pad_token_id"])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        differing = _differing_probes(tokenizer, original)
    except Exception as error:  # the files may hold anything
        raise ValueError(
            f"The files of the tokenizer {name} make no tokenizer ({type(error).__name__}: {str(error)[:200]}). Fetch "
            "them again, or give another tokenizer."
        ) from error
    size = max([len(tokenizer), *(token_id + 1 for token_id in tokenizer.get_vocab().values())])
    if size > model_config["vocab_size"]:
        raise ValueError(
            f"The tokenizer {name} has {size:,} tokens, but the model has embeddings for "
            f"{model_config['vocab_size']:,}. Give the tokenizer that the model was trained with."
        )
    if differing:
        raise ValueError(
            f"transformers makes other ids than the `tokenizer.json` of the tokenizer {name} from {differing}, and "
            "the model would read another text. Give a tokenizer whose `tokenizer.json` says all of what it does."
        )
    return tokenizer


def _write_special_tokens(folder, original, pad_token_id):
    """Has transformers take `tokenizer.json` verbatim, not rebuild it, with the predecessor's special tokens."""
    tokens = {role: token for role, token in SPECIAL_TOKENS.items() if original.token_to_id(token) is not None}
    if original.token_to_id(SPECIAL_TOKENS["pad_token"]) != pad_token_id:
        tokens.pop("pad_token", None)
    loading = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right"}
    for name, changes in (("tokenizer_config.json", {**loading, **tokens}), ("special_tokens_map.json", tokens)):
        file = folder / name
        if not file.is_file() and changes is tokens:
            continue
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        content.pop("auto_map", None)  # its code is not copied
        file.write_text(json.dumps({**content, **changes}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _differing_probes(tokenizer, original):
    original.no_padding()
    original.no_truncation()
    added = [token.content for token in original.get_added_tokens_decoder().values()]
    probes = [*PROBES, *(probe.format(token) for token in added[:100] for probe in PROBES_AROUND_A_TOKEN)]
    return [probe for probe in probes if tokenizer(probe)["input_ids"] != original.encode(probe).ids][:3]
