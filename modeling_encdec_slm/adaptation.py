# SPDX-License-Identifier: Apache-2.0
"""Initialize encoder-decoders from decoder-only checkpoints."""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from .checkpoints import TOKENIZER_FILES, check_no_adapter, find_checkpoint_folder, read_config
from .configuration_encdec_slm import EncDecSLMConfig
from .errors import format_list, summarize_error
from .modeling_encdec_slm import EncDecSLMForConditionalGeneration
from .vocabulary import old_token_ids, read_vocabulary_map


logger = logging.getLogger(__name__)

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
STRATEGIES = ("outer", "even", "first-last")
# Share of all layers that the encoder gets.
SPLITS = {"2/3-1/3": 2 / 3, "1/2-1/2": 1 / 2, "1/3-2/3": 1 / 3}
COPIED_FIELDS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("rms_norm_eps", "rope_parameters", "max_position_embeddings", "attention_dropout", "initializer_range"),
    "tie_word_embeddings",
)
# Fields that change what a source computes and that this family does not have; unset or False if not used.
UNSUPPORTED_FIELDS = {
    "attn_logit_softcapping": "logit soft-capping",
    "final_logit_softcapping": "logit soft-capping",
    "logits_soft_cap": "logit soft-capping",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "quantization_config": "quantized weights",
}
VOCABULARY_WEIGHTS = ("model.embed_tokens.weight", "lm_head.weight")
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights are copied in blocks of this size. Up to three of them are in memory at once: as pages of the mapped file, as
# read, and as the rows of kept tokens.
BLOCK_BYTES = 4 * 2**20


def from_decoder_only(
    model_or_repo: str | Path | PreTrainedModel,
    *,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    split: str = "2/3-1/3",
    strategy: str | tuple[Sequence[int], Sequence[int]] = "outer",
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
) -> EncDecSLMForConditionalGeneration:
    """Initialize an encoder-decoder with the weights of a decoder-only model, in evaluation mode.

    Layers of the source are copied to both stacks, as in T5Gemma (arXiv 2504.06225): bidirectional in the encoder,
    causal in the decoder, where the self-attention and its norm are also copied to the cross-attention. The output
    projection of the cross-attention is zero, so that the decoder starts as a language model of the targets instead of
    adding noise. Its keys and values read the encoder's output as they read the layer's input in the source: the gain
    of that layer's input norm is multiplied into their weights, and the encoder's final norm has a gain of one.
    Embeddings are shared. The result must be trained before it is useful.

    Weights of a folder are read in blocks, so that memory holds the result and one block.

    Args:
        model_or_repo (`str`, `Path` or [`~transformers.PreTrainedModel`]): A folder with safetensors, a repository on
            the Hub, or a model in memory, which is not changed. Llama (also SmolLM2, TinyLlama), SmolLM3, Mistral
            without a sliding window, Qwen2 or Qwen3.
        encoder_layers (`int`, *optional*): Layers of the encoder, at most those of the source. `None` takes the
            share given by `split`.
        decoder_layers (`int`, *optional*): Layers of the decoder, likewise.
        split (`str`, *optional*, defaults to `"2/3-1/3"`): Shares of encoder and decoder in the source's layers:
            `"2/3-1/3"`, `"1/2-1/2"` or `"1/3-2/3"`.
        strategy (`str` or `tuple`, *optional*, defaults to `"outer"`): Which layers are copied, see [`select_layers`];
            or their indices (from 0) for the encoder and for the decoder, in place of the arguments above.
        tokenizer (`str`, `Path` or [`~transformers.PreTrainedTokenizerBase`], *optional*): The source's tokenizer, or
            one that adds tokens to it; its special tokens are used. One from [`~encdec_slm.vocabulary.trim_tokenizer`]
            copies just the rows of its tokens. A tokenizer in memory that has no padding token is given one. `None`
            uses the tokenizer in the source's folder, if there is one.

    Returns:
        [`EncDecSLMForConditionalGeneration`]: In the source's dtype, on its device. Special token ids come from the
        tokenizer, then from the source's configs; the decoder starts with the beginning-of-sequence token.

    Raises:
        ValueError: The source has features that this family lacks, its folder is no checkpoint or damaged, a number of
            layers, `split` or `strategy` is not available, or the tokenizer has other tokens.
        TypeError: The source is an object, but not a transformers model.
    """
    is_folder = isinstance(model_or_repo, str | Path)
    source = _open_folder(model_or_repo) if is_folder else _open_model(model_or_repo)
    _check_config(source.config.to_dict(), source.name)
    depth = source.config.num_hidden_layers
    if isinstance(strategy, str):
        layers = select_layers(strategy, depth, *_count_layers(depth, encoder_layers, decoder_layers, split))
    else:
        layers = _check_layers(strategy, depth)
    _check_weights(source)
    tokenizer, old_ids = _load_matching_tokenizer(tokenizer, source)
    model = _build_model(source, layers, _select_token_ids(source, tokenizer, old_ids), len(old_ids))
    _copy_weights(source, model, layers, old_ids)
    logger.info(
        f"{source.name}: of {depth} layers (from 0), {format_list(layers[0], 100)} are copied to the encoder and "
        f"{format_list(layers[1], 100)} to the decoder."
    )
    return model


def select_layers(strategy: str, depth: int, encoder_layers: int, decoder_layers: int) -> tuple[list[int], list[int]]:
    """Return the indices (from 0) of the source's layers that are copied to the encoder and to the decoder.

    Args:
        strategy (`str`): `"outer"`: the encoder takes the first layers, the decoder the first ones and every second
            one up to the last. `"even"`: both stacks take layers at even distances, from the first to the last.
            `"first-last"`: the encoder takes the first layers, the decoder the last.
        depth (`int`): Layers of the source.
        encoder_layers (`int`): Layers of the encoder, 1 to `depth`.
        decoder_layers (`int`): Layers of the decoder, 1 to `depth`.

    Raises:
        ValueError: There is no such strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` is {strategy!r}, but must be one of {', '.join(STRATEGIES)}.")
    if strategy == "even":
        return _space_evenly(0, depth - 1, encoder_layers), _space_evenly(0, depth - 1, decoder_layers)
    if strategy == "first-last":
        return list(range(encoder_layers)), list(range(depth - decoder_layers, depth))
    num_first = max(1, (decoder_layers - 1) // 2)
    num_last = decoder_layers - num_first
    start = max(num_first, depth - 2 * num_last + 1)
    return list(range(encoder_layers)), [*range(num_first), *_space_evenly(start, depth - 1, num_last)]


def _space_evenly(first, last, count):
    steps = max(count - 1, 1)
    return [first + (2 * index * (last - first) + steps) // (2 * steps) for index in range(count)]  # rounds halves up


def _check_layers(layers, depth):
    if len(layers) != 2 or not all(stack and all(0 <= index < depth for index in stack) for stack in layers):
        raise ValueError(
            f"`strategy` is {layers!r}, but must be indices (0 to {depth - 1}) of layers for the encoder and for the "
            f"decoder, or one of {', '.join(STRATEGIES)}."
        )
    return tuple(map(list, layers))


def _count_layers(depth, encoder_layers, decoder_layers, split):
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}, but must be one of {', '.join(SPLITS)}.")
    encoder_share = min(max(1, round(depth * SPLITS[split])), max(1, depth - 1))
    defaults = {"encoder_layers": encoder_share, "decoder_layers": max(1, depth - encoder_share)}
    counts = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    for name, count in counts.items():
        if count is not None and not 1 <= count <= depth:
            raise ValueError(
                f"`{name}` is {count}, but must be 1 to {depth}: each layer is copied from one of the source's "
                f"{depth} layers, at most once per stack."
            )
    return [defaults[name] if count is None else count for name, count in counts.items()]


# Source


class _StoredTensor:
    """A tensor in a safetensors file, which is opened again for every read."""

    def __init__(self, opened, file, name):
        tensor = opened.get_slice(name)
        self.file, self.name, self.is_meta = file, name, False
        self.shape, self.dtype = torch.Size(tensor.get_shape()), FLOAT_DTYPES.get(tensor.get_dtype())

    def __getitem__(self, rows):
        with _open_weights(self.file) as opened:
            return opened.get_slice(self.name)[rows]


@dataclass
class _Source:
    name: str
    folder: Path | None
    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    tensors: Mapping[str, torch.Tensor | _StoredTensor]
    device: torch.device

    @property
    def dtype(self):
        return self.tensors["model.embed_tokens.weight"].dtype


def _open_model(model):
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model_or_repo` is a {type(model).__name__}, but must be a folder, the name of a repository or a "
            "transformers model. If it has adapters, pass what `merge_and_unload()` returns."
        )
    name = model.config.name_or_path
    return _Source(
        name=name or f"a {type(model).__name__} in memory",
        folder=Path(name) if name else None,
        config=model.config,
        generation_config=getattr(model, "generation_config", None),  # a model without a head has none
        tensors={name: tensor.detach() for name, tensor in model.named_parameters()},
        device=model.device,
    )


def _open_folder(name_or_path):
    folder = find_checkpoint_folder(name_or_path, ("*.json", "model*.safetensors", *TOKENIZER_FILES))
    check_no_adapter(folder)
    _check_config(read_config(folder), str(name_or_path))  # before transformers loads a config of another kind
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        has_generation_config = (folder / "generation_config.json").is_file()
        generation_config = GenerationConfig.from_pretrained(folder) if has_generation_config else None
    except (StrictDataclassError, OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"config.json or generation_config.json of {str(name_or_path)!r} cannot be loaded "
            f"({summarize_error(error)}). Download the folder again."
        ) from error
    return _Source(
        str(name_or_path), folder, config, generation_config, _find_tensors(folder), device=torch.device("cpu")
    )


def _find_tensors(folder):
    tensors = {}
    for file in _find_weight_files(folder):
        with _open_weights(file) as opened:
            tensors |= {name: _StoredTensor(opened, file, name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def _find_weight_files(folder):
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{str(folder)!r} has no model.safetensors or model.safetensors.index.json, only "
            f"{format_list(sorted(path.name for path in folder.iterdir()))}. Load weights in another format with "
            "`AutoModelForCausalLM` and pass the model."
        )
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files outside of the folder")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{index.name} of {str(folder)!r} cannot be read ({summarize_error(error)}). Download the folder again."
        ) from error
    return [folder / name for name in sorted(names)]


def _open_weights(file):
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(file)!r} cannot be read ({summarize_error(error)}): it is missing, truncated, or a Git LFS "
            "pointer. Download it again."
        ) from error


def _check_config(fields: Mapping[str, Any], name: str) -> None:
    """Refuse a config (the fields of config.json) with features that this family lacks."""
    found = []
    if fields.get("model_type") not in ARCHITECTURES:
        found.append(f"another architecture (`model_type` {fields.get('model_type')!r})")
    window, layer_types = fields.get("sliding_window"), set(fields.get("layer_types") or ())
    # Layer types, if there are any, decide whether the window is used.
    if "sliding_attention" in layer_types or (not layer_types and window and fields.get("use_sliding_window", True)):
        found.append(f"a sliding window (`sliding_window` {window})")
    if others := sorted(layer_types - {"full_attention", "sliding_attention"}):
        found.append(f"other kinds of layers (`layer_types` {', '.join(others)})")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    share = fields.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if share not in (None, 1.0):
        found.append(f"partial rotary embeddings (`partial_rotary_factor` {share})")
    for field, meaning in UNSUPPORTED_FIELDS.items():
        if fields.get(field):
            value = f" {fields[field]}" if not isinstance(fields[field], dict) else ""
            found.append(f"{meaning} (`{field}`{value})")
    if found:
        raise ValueError(
            f"{name!r} cannot be adapted: it has {'; '.join(found)}, which this family does not support. Give a "
            f"model with full attention in every layer, of type {', '.join(ARCHITECTURES)}."
        )


def source_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Return names and shapes of the weights of the decoder-only model that `config` describes, without tied ones."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _check_weights(source):
    found, required = source.tensors, source_shapes(source.config)
    # Old Llama folders hold tables of rotary embeddings, and some tied ones hold the embeddings twice.
    extra = [key for key in found if key not in required and key != "lm_head.weight" and not key.endswith("inv_freq")]
    problems = {
        "missing": [key for key in required if key not in found],
        "unexpected": extra,
        "of another shape": [
            f"{key} {tuple(found[key].shape)} instead of {tuple(shape)}"
            for key, shape in required.items()
            if key in found and found[key].shape != shape
        ],
        "not in memory": [key for key in required if key in found and found[key].is_meta],
        "not floating point": [
            key for key in required if key in found and found[key].dtype not in FLOAT_DTYPES.values()
        ],
    }
    if any(problems.values()):
        differences = "; ".join(f"{kind}: {format_list(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(
            f"The weights of {source.name!r} do not fit its config. {differences}. Give a complete, unquantized "
            "language model, as `AutoModelForCausalLM` loads it, without adapters or offloading."
        )


# Tokenizer


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or of a repository on the Hub, without running code from there.

    Raises:
        ValueError: There is no tokenizer that transformers can load.
    """
    folder = find_checkpoint_folder(name_or_path, ("config.json", *TOKENIZER_FILES))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The tokenizer of {str(name_or_path)!r} cannot be loaded ({summarize_error(error)}). Download its "
            "tokenizer files, or give the tokenizer of the model that it was made from."
        ) from error


def _load_matching_tokenizer(tokenizer, source) -> tuple[PreTrainedTokenizerBase | None, Sequence[int]]:
    """Load the given tokenizer or the source's own, and the rows of the source's embeddings that its ids take."""
    own, files = None, ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if source.folder is not None and any((source.folder / name).is_file() for name in files):
        own = load_tokenizer(source.folder)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    old_ids = range(source.config.vocab_size)
    if tokenizer is None:
        tokenizer = own
    elif read_vocabulary_map(tokenizer) is not None and (own is None or read_vocabulary_map(own) is None):
        old_ids = old_token_ids(tokenizer, own)
    elif own is not None:
        _check_same_tokens(tokenizer, own, source.name)
    num_tokens = 0 if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    if num_tokens > len(old_ids) or old_ids[-1] >= source.config.vocab_size:
        raise ValueError(
            f"`tokenizer` has {num_tokens} ids, but {source.name} has embeddings for {len(old_ids)} of them. Give "
            "the tokenizer that it was trained with; tokens can be added after `resize_token_embeddings`."
        )
    return tokenizer, old_ids


def _check_same_tokens(tokenizer, own, name):
    own_tokens = {index: token for token, index in own.get_vocab().items()}
    differing = [
        f"{index} is {token!r}, not {own_tokens[index]!r}"
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if own_tokens.get(index, token) != token
    ]
    if differing:
        raise ValueError(
            f"`tokenizer` does not match the embeddings of {name}: {len(differing)} ids are other tokens "
            f"({format_list(differing, 3)}). Leave it out, or give the source's tokenizer with tokens added at its "
            "end."
        )


def _select_token_ids(source, tokenizer, old_ids) -> dict[str, int | list[int] | None]:
    """Return the special token ids of the tokenizer, completed by those of the source's configs."""
    new_ids = {old_id: new_id for new_id, old_id in enumerate(old_ids)}

    def collect(kind):
        values = [getattr(config, f"{kind}_token_id", None) for config in (source.config, source.generation_config)]
        flat = [token_id for value in values for token_id in (value if isinstance(value, list) else [value])]
        own = getattr(tokenizer, f"{kind}_token_id", None)
        token_ids = [own, *(new_ids.get(token_id) for token_id in flat)]
        return [token_id for token_id in dict.fromkeys(token_ids) if token_id is not None]

    bos, eos, pad = collect("bos")[:1], collect("eos"), collect("pad")[:1]
    pad_token_id, start_token_id = (pad + eos + bos + [0])[0], (bos + eos + pad + [0])[0]
    if tokenizer is not None and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    return {
        "pad_token_id": pad_token_id,
        "bos_token_id": start_token_id,
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
        "decoder_start_token_id": start_token_id,
    }


# Result


def _build_model(source, layers, token_ids, vocab_size):
    with no_init_weights(), torch.device(source.device):
        config = _adapt_config(source.config, layers, token_ids, vocab_size)
        model = EncDecSLMForConditionalGeneration._from_config(config, dtype=source.dtype).eval()
    model.tie_weights()  # otherwise part of the initialization
    model.config.name_or_path = source.name
    model.generation_config.update(**token_ids)
    return model


def _adapt_config(source: PreTrainedConfig, layers, token_ids, vocab_size) -> EncDecSLMConfig:
    is_qwen2 = source.model_type == "qwen2"  # has biases that are no fields of its config
    attention_bias = is_qwen2 or getattr(source, "attention_bias", False)
    use_rope = getattr(source, "no_rope_layers", None)
    return EncDecSLMConfig(
        **{name: copy.deepcopy(getattr(source, name)) for name in COPIED_FIELDS},
        **token_ids,
        vocab_size=vocab_size,
        head_dim=getattr(source, "head_dim", None),
        encoder_num_hidden_layers=len(layers[0]),
        decoder_num_hidden_layers=len(layers[1]),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias and not is_qwen2,
        mlp_bias=getattr(source, "mlp_bias", False),
        qk_norm=source.model_type == "qwen3",
        encoder_no_rope_layers=None if use_rope is None else [use_rope[index] for index in layers[0]],
        decoder_no_rope_layers=None if use_rope is None else [use_rope[index] for index in layers[1]],
    )


@torch.no_grad()
def _copy_weights(source, model, layers, old_ids):
    old_ids = torch.tensor(old_ids)
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name in parameters:
        if ".cross_attn.o_proj." in name:
            parameters[name].zero_()
            missing.remove(name)
    model.model.encoder.norm.weight.fill_(1.0)
    missing.remove("model.encoder.norm.weight")
    for name, shape in source_shapes(source.config).items():
        targets = _target_names(name, layers)
        num_rows = max(1, BLOCK_BYTES // (shape[1:].numel() * source.dtype.itemsize))
        for first in range(0, shape[0], num_rows):
            rows, places = source.tensors[name][first : first + num_rows], slice(first, first + num_rows)
            if name in VOCABULARY_WEIGHTS:
                start, stop = torch.searchsorted(old_ids, torch.tensor([first, first + num_rows])).tolist()
                rows, places = rows[old_ids[start:stop] - first], slice(start, stop)
            for target in targets:
                parameters[target][places].copy_(rows)
        missing -= set(targets)
    for layer in model.model.decoder.layers:
        for projection in (layer.cross_attn.k_proj, layer.cross_attn.v_proj):
            projection.weight.mul_(layer.input_layernorm.weight)
    if missing:
        raise RuntimeError(f"No weights were copied to {format_list(sorted(missing))}. Please report this error.")


def _target_names(name: str, layers: tuple[list[int], list[int]]) -> list[str]:
    """Return the names of the encoder-decoder's weights that a weight of the source is copied to."""
    if name == "lm_head.weight":
        return [name]
    if name == "model.embed_tokens.weight":
        return ["model.encoder.embed_tokens.weight"]
    if name == "model.norm.weight":
        return ["model.decoder.norm.weight"]
    _, _, index, rest = name.split(".", 3)  # model.layers.<index>.<rest>
    encoder, decoder = ([place for place, layer in enumerate(stack) if layer == int(index)] for stack in layers)
    targets = [f"model.encoder.layers.{place}.{rest}" for place in encoder]
    for place in decoder:
        targets.append(f"model.decoder.layers.{place}.{rest}")
        if rest.startswith("self_attn.") and not rest.startswith("self_attn.o_proj."):
            targets.append(f"model.decoder.layers.{place}.{rest.replace('self_attn', 'cross_attn', 1)}")
        elif rest == "input_layernorm.weight":
            targets.append(f"model.decoder.layers.{place}.pre_cross_attn_layernorm.weight")
    return targets


__all__ = ["from_decoder_only", "load_tokenizer", "select_layers", "source_shapes"]
