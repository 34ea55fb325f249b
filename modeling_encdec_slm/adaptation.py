# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders cut from decoder-only checkpoints: both stacks and the cross-attention begin as copies."""

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
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

from .checkpoint_folders import TOKENIZER_FILES, first_line, listed, local_folder
from .configuration.sizes import SPLITS
from .configuration_encdec_slm import EncDecSLMConfig
from .modeling_encdec_slm import EncDecSLMForConditionalGeneration


logger = logging.getLogger(__name__)

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
STRATEGIES = ("even", "first-last")
CHECKPOINT_FILES = ("*.json", "model*.safetensors", *TOKENIZER_FILES)
CARRIED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("rms_norm_eps", "rope_parameters", "max_position_embeddings", "attention_dropout", "initializer_range"),
    "tie_word_embeddings",
)
# What would change the numbers of a source and has no counterpart here; unset or False where it is not used.
UNSUPPORTED_FIELDS = {
    "attn_logit_softcapping": "logit soft-capping",
    "final_logit_softcapping": "logit soft-capping",
    "logits_soft_cap": "logit soft-capping",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "quantization_config": "quantized weights",
}
TELLING_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A mapped file counts as memory where it was read, so it is mapped anew for every block of so many bytes.
BLOCK_BYTES = 16 * 2**20


def from_decoder_only(
    model_or_repo: str | Path | PreTrainedModel,
    *,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    split: str = "2/3-1/3",
    strategy: str = "even",
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
) -> EncDecSLMForConditionalGeneration:
    """An encoder-decoder that begins with the weights of a decoder-only model, in eval mode.

    Layers of the source are copied to both stacks (T5Gemma's recipe, arXiv 2504.06225). In the encoder they become
    bidirectional; in the decoder their self-attention, with its norm, is copied to the cross-attention too. The two
    stacks share the embedding table, and both end in the source's final norm. It needs training before it is of use:
    it has never read a source.

    Weights of a folder are read in blocks, so that no more than the result and one block is in memory.

    Args:
        model_or_repo (`str`, `Path` or [`~transformers.PreTrainedModel`]): A folder with safetensors, the name of a
            repository on the Hub, or a model in memory, which is not changed. Llama (SmolLM2, TinyLlama and others are
            such), SmolLM3, Mistral without a sliding window, Qwen2 or Qwen3.
        encoder_layers (`int`, *optional*): Layers of the encoder, at most all of the source's. `None` takes the
            encoder's share of the source's layers in `split`.
        decoder_layers (`int`, *optional*): Layers of the decoder, likewise.
        split (`str`, *optional*, defaults to `"2/3-1/3"`): Shares of encoder and decoder: `"2/3-1/3"`, `"1/2-1/2"` or
            `"1/3-2/3"`.
        strategy (`str`, *optional*, defaults to `"even"`): Which layers are copied; see [`kept_layers`].
        tokenizer (`str`, `Path` or [`~transformers.PreTrainedTokenizerBase`], *optional*): Whose special tokens the
            model is to use: the source's, or one that adds tokens to it. A tokenizer object without a padding token is
            given the model's. `None` takes the one in the source's folder, if there is one.

    Returns:
        [`EncDecSLMForConditionalGeneration`]: In the source's dtype, on its device. Token ids, also those that
        `generate` reads, are the tokenizer's, completed by the source's configs; the decoder starts with the
        beginning-of-text token.

    Raises:
        ValueError: The source has what this family cannot represent; its folder is no checkpoint, or a damaged one; a
            number of layers, `split` or `strategy` is unknown or does not fit; the tokenizer has other tokens.
        TypeError: The source is an object, but no model of transformers.
    """
    source = _ModelSource(model_or_repo) if not isinstance(model_or_repo, str | Path) else _FolderSource(model_or_repo)
    _check_source(source.config.to_dict(), source.name)
    depth = source.config.num_hidden_layers
    counts = _layer_counts(depth, encoder_layers, decoder_layers, split)
    kept = kept_layers(strategy, depth, *counts)
    source.check_weights()
    token_ids = _token_ids(source, _own_or_given(tokenizer, source))
    config = _adapted_config(source.config, kept, token_ids)
    model = _empty_model(config, source.dtype, source.device)
    _copy_weights(source, model, kept)
    model.config.name_or_path = source.name
    model.generation_config.update(**token_ids)
    logger.info(
        f"{source.name}: the encoder begins as layers {listed(kept[0], 100)}, the decoder as layers "
        f"{listed(kept[1], 100)}, of {depth} (from 0)."
    )
    return model


def kept_layers(strategy: str, depth: int, encoder_layers: int, decoder_layers: int) -> tuple[list[int], list[int]]:
    """Indices (from 0) of the source's layers that the encoder and the decoder begin as.

    Args:
        strategy (`str`): `"even"`: each stack takes layers at even distances, from the first to the last.
            `"first-last"`: the encoder takes the first ones, the decoder the last ones.
        depth (`int`): Layers of the source.
        encoder_layers (`int`): Of the encoder; 1 to `depth`.
        decoder_layers (`int`): Of the decoder; 1 to `depth`.

    Raises:
        ValueError: There is no such strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}. Available strategies: {', '.join(STRATEGIES)}.")
    if strategy == "first-last":
        return list(range(encoder_layers)), list(range(depth - decoder_layers, depth))
    return _even_layers(depth, encoder_layers), _even_layers(depth, decoder_layers)


def _even_layers(depth, num_kept):
    steps = max(num_kept - 1, 1)
    return [(2 * index * (depth - 1) + steps) // (2 * steps) for index in range(num_kept)]  # rounds halves up


def _layer_counts(depth, encoder_layers, decoder_layers, split):
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Available splits: {', '.join(SPLITS)}.")
    num_encoder_layers = min(max(1, round(depth * SPLITS[split])), max(1, depth - 1))
    shares = (num_encoder_layers, max(1, depth - num_encoder_layers))
    given = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    for name, count in given.items():
        if count is not None and not 1 <= count <= depth:
            raise ValueError(
                f"`{name}` is {count}, but each layer is a copy of one of the source's {depth}, at most once per "
                f"stack. Set it to 1 to {depth}, or leave it out for its share in `split`."
            )
    return tuple(share if count is None else count for share, count in zip(shares, given.values(), strict=True))


# What is there to be copied


class _ModelSource:
    """A decoder-only model in memory."""

    def __init__(self, model):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"`model_or_repo` is a {type(model).__name__}, but must be a folder, the name of a repository or a "
                "model of transformers. Of a model with adapters, give what `merge_and_unload()` returns."
            )
        self.config = model.config
        self.name = model.config.name_or_path or f"a {type(model).__name__} in memory"
        self.folder = Path(model.config.name_or_path) if model.config.name_or_path else None
        self.generation_config = getattr(model, "generation_config", None)  # a model without a head has none
        self.tensors = dict(model.named_parameters())
        self.device = model.device

    def check_weights(self):
        if any(tensor.is_meta for tensor in self.tensors.values()):
            raise ValueError(
                f"The weights of {self.name} are not in memory (some are on the meta device), but are to be copied. "
                "Load the model without offloading, or give its folder."
            )
        _check_shapes(
            {name: tensor.shape for name, tensor in self.tensors.items()}, source_shapes(self.config), self.name
        )
        self.dtype = self.tensors["model.embed_tokens.weight"].dtype

    def blocks(self, name) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row and the rows of each block of a tensor."""
        yield 0, self.tensors[name].detach()


class _FolderSource:
    """The safetensors of a decoder-only model."""

    device = torch.device("cpu")

    def __init__(self, name_or_path):
        self.name = str(name_or_path)
        self.folder = local_folder(name_or_path, CHECKPOINT_FILES)
        fields = _read_json(self.folder / "config.json", self.name)
        _check_source(fields, self.name)
        try:
            self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # of a strict config: not a ValueError
            raise ValueError(
                f"config.json of {self.name!r} does not describe a model ({error}). Fetch the folder again."
            ) from error
        self.generation_config = None
        if (self.folder / "generation_config.json").is_file():
            self.generation_config = GenerationConfig.from_pretrained(self.folder)

    def check_weights(self):
        self.files = self._files_by_tensor()
        shapes, dtypes = {}, {}
        for file in sorted(set(self.files.values())):
            with self._opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    tensor = opened.get_slice(name)
                    shapes[name], dtypes[name] = torch.Size(tensor.get_shape()), tensor.get_dtype()
        _check_shapes(shapes, source_shapes(self.config), self.name)
        if odd := {name: dtype for name, dtype in dtypes.items() if dtype not in FLOAT_DTYPES}:
            raise ValueError(
                f"{self.name!r} has tensors that are no plain floating point numbers: "
                f"{listed(f'{name} ({dtype})' for name, dtype in odd.items())}. Give an unquantized checkpoint."
            )
        self.dtype = FLOAT_DTYPES[dtypes["model.embed_tokens.weight"]]

    def _files_by_tensor(self):
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if single.is_file():
            with self._opened(single) as opened:
                return dict.fromkeys(opened.keys(), single)
        if not index.is_file():
            others = listed(sorted(path.name for path in self.folder.iterdir())) or "no files"
            raise ValueError(
                f"{self.name!r} has neither model.safetensors nor model.safetensors.index.json, but {others}. Weights "
                "in another form can be loaded with `AutoModelForCausalLM` and given as a model."
            )
        files = _read_json(index, self.name).get("weight_map")
        if not isinstance(files, dict) or any(Path(file).name != file for file in map(str, files.values())):
            raise ValueError(
                f"`weight_map` in {index.name} of {self.name!r} does not name files of the folder. Fetch it again."
            )
        return {name: self.folder / file for name, file in files.items()}

    def _opened(self, file):
        try:
            return safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file.name} of {self.name!r} is damaged or missing ({error}): it was cut off while it was "
                "downloaded or copied, or it is a Git LFS pointer. Fetch it again."
            ) from error

    def blocks(self, name):
        with self._opened(self.files[name]) as opened:
            num_rows, *rest = opened.get_slice(name).get_shape()
        num_rows_per_block = max(1, BLOCK_BYTES // (torch.Size(rest).numel() * self.dtype.itemsize))
        for first in range(0, num_rows, num_rows_per_block):
            with self._opened(self.files[name]) as opened:
                yield first, opened.get_slice(name)[first : first + num_rows_per_block]


def _read_json(path, name):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} has no {path.name} that can be read ({type(error).__name__}: {error}), as the folder of a "
            "model has. Give a folder that `save_pretrained` wrote, or the name of a model on the Hub."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} of {name!r} is no JSON object, as a model's is. Fetch the folder again.")
    return content


# What can be represented


def _check_source(fields: Mapping[str, Any], name: str) -> None:
    """Refuses a config with what would be lost; `fields` are those of config.json."""
    found = []
    if fields.get("model_type") not in ARCHITECTURES:
        found.append(f"another architecture (`model_type` {fields.get('model_type')!r})")
    window, layer_types = fields.get("sliding_window"), set(fields.get("layer_types") or ())
    # Where layers have types, these say whether a window is used; where they have none, one that is given is.
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
            f"{name!r} cannot be adapted: it has {'; '.join(found)}, which this family cannot represent. Needed is "
            f"one of the architectures {', '.join(ARCHITECTURES)}, in which every layer reads all positions."
        )


def source_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of the weights of the decoder-only model that `config` describes; tied ones are left out."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _check_shapes(found: Mapping[str, torch.Size], needed: Mapping[str, torch.Size], name: str) -> None:
    # Old Llama folders carry tables of their rotary embeddings, and some tied ones the table twice.
    extra = [key for key in found if key not in needed and key != "lm_head.weight" and not key.endswith(".inv_freq")]
    problems = {
        "missing": [key for key in needed if key not in found],
        "not of this architecture": extra,
        "of another shape": [
            f"{key} {tuple(found[key])} instead of {tuple(shape)}"
            for key, shape in needed.items()
            if key in found and found[key] != shape
        ],
    }
    if any(problems.values()):
        differences = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(
            f"The weights of {name!r} are not those that its config describes. {differences}. Give a whole language "
            "model, as `AutoModelForCausalLM` loads it, without adapters."
        )


# Tokens


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a repository on the Hub, without running code that lies there.

    Raises:
        ValueError: There is none that transformers can load.
    """
    folder = local_folder(name_or_path, ("config.json", *TOKENIZER_FILES))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(name_or_path)!r} has no tokenizer that can be loaded ({first_line(error)}). Fetch its "
            "tokenizer files, or give the tokenizer of the model that it was made from."
        ) from error


def _own_or_given(tokenizer, source) -> PreTrainedTokenizerBase | None:
    own = None
    if source.folder is not None and any((source.folder / name).is_file() for name in TELLING_TOKENIZER_FILES):
        own = load_tokenizer(source.folder)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is None:
        tokenizer = own
    elif own is not None:
        _check_same_tokens(tokenizer, own, source.name)
    vocab_size = source.config.vocab_size
    if tokenizer is not None and (num_tokens := max(tokenizer.get_vocab().values()) + 1) > vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {num_tokens - 1}, but {source.name} has embeddings for {vocab_size} tokens. "
            "Give the tokenizer that it was trained with; tokens can be added after `resize_token_embeddings`."
        )
    return tokenizer


def _check_same_tokens(tokenizer, own, name):
    own_tokens = {index: token for token, index in own.get_vocab().items()}
    differing = [
        f"{index} is {token!r}, not {own_tokens[index]!r}"
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if own_tokens.get(index, token) != token
    ]
    if differing:
        raise ValueError(
            f"The tokenizer is not that of {name}, whose embeddings are copied: {len(differing)} ids mean other "
            f"tokens ({listed(differing, 3)}). Leave `tokenizer` out, or give the source's own with tokens added at "
            "its end."
        )


def _token_ids(source, tokenizer) -> dict[str, int | list[int] | None]:
    """Token ids for config and generation config: the tokenizer's, then those that the source's configs name."""
    givers = [giver for giver in (tokenizer, source.config, source.generation_config) if giver is not None]

    def named(kind):
        values = [getattr(giver, f"{kind}_token_id", None) for giver in givers]
        flat = [token_id for value in values for token_id in (value if isinstance(value, list) else [value])]
        in_range = [token_id for token_id in flat if token_id is not None and 0 <= token_id < source.config.vocab_size]
        return list(dict.fromkeys(in_range))

    bos, eos, pad = named("bos")[:1], named("eos"), named("pad")[:1]
    # Some have no padding token, or nothing to begin with; what ends a text serves for both, and 0 where nothing does.
    pad_token_id, start = (pad + eos + bos + [0])[0], (bos + eos + pad + [0])[0]
    if tokenizer is not None and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    return {
        "pad_token_id": pad_token_id,
        "bos_token_id": start,
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
        "decoder_start_token_id": start,
    }


# The result


def _adapted_config(source: PreTrainedConfig, kept, token_ids) -> EncDecSLMConfig:
    is_qwen2 = source.model_type == "qwen2"  # has biases that its config does not name
    attention_bias = is_qwen2 or getattr(source, "attention_bias", False)
    use_rope = getattr(source, "no_rope_layers", None)
    return EncDecSLMConfig(
        **{name: copy.deepcopy(getattr(source, name)) for name in CARRIED_FIELDS},
        **token_ids,
        head_dim=getattr(source, "head_dim", None),
        encoder_num_hidden_layers=len(kept[0]),
        decoder_num_hidden_layers=len(kept[1]),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias and not is_qwen2,
        mlp_bias=getattr(source, "mlp_bias", False),
        qk_norm=source.model_type == "qwen3",
        encoder_no_rope_layers=None if use_rope is None else [use_rope[index] for index in kept[0]],
        decoder_no_rope_layers=None if use_rope is None else [use_rope[index] for index in kept[1]],
    )


def _empty_model(config, dtype, device):
    with no_init_weights(), torch.device(device):
        model = EncDecSLMForConditionalGeneration._from_config(config, dtype=dtype).eval()
    model.tie_weights()  # which comes with the initialisation elsewhere
    return model


@torch.no_grad()
def _copy_weights(source, model, kept):
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for name in source_shapes(source.config):
        targets = _targets(name, kept)
        for first, rows in source.blocks(name):
            for target in targets:
                parameters[target][first : first + len(rows)].copy_(rows)
        missing -= set(targets)
    if missing:
        raise RuntimeError(f"Nothing was copied to {listed(sorted(missing))}: this is a fault of the adaptation.")


def _targets(name: str, kept: tuple[list[int], list[int]]) -> list[str]:
    """Weights of the encoder-decoder that a weight of the source is copied to."""
    if name == "lm_head.weight":
        return [name]
    if name == "model.embed_tokens.weight":
        return ["model.encoder.embed_tokens.weight"]
    if name == "model.norm.weight":
        return ["model.encoder.norm.weight", "model.decoder.norm.weight"]
    _, _, index, rest = name.split(".", 3)  # model.layers.<index>.<rest>
    targets = [f"model.encoder.layers.{place}.{rest}" for place in _places(int(index), kept[0])]
    for place in _places(int(index), kept[1]):
        targets.append(f"model.decoder.layers.{place}.{rest}")
        if rest.startswith("self_attn."):
            targets.append(f"model.decoder.layers.{place}.{rest.replace('self_attn', 'cross_attn', 1)}")
        elif rest == "input_layernorm.weight":
            targets.append(f"model.decoder.layers.{place}.pre_cross_attn_layernorm.weight")
    return targets


def _places(index, layers):
    return [place for place, layer in enumerate(layers) if layer == index]
