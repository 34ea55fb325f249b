# SPDX-License-Identifier: Apache-2.0
"""Run a CTranslate2 export with the interface of a model: `generate`, streamers and pipelines."""

import contextlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, StopStringCriteria
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput, GenerateEncoderDecoderOutput
from transformers.utils import ModelOutput

from ..configuration_encdec_slm import EncDecSLMConfig
from ..errors import format_list, summarize_error
from ..export_manifest import find_export
from .bundles import import_engine
from .ctranslate2_converter import FORMAT, NO_TOKEN, VOCABULARY_FILE, WEIGHTS_FILE, list_ids, start_token_id
from .exported_model import ExportedModel, check_attention_mask, check_token_ids


# Larger than any vocabulary.
NO_TOKEN_ID = 2**31 - 1
# Settings that CTranslate2 follows as transformers does. All others must have the value that changes nothing.
SUPPORTED = frozenset(
    {
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "eos_token_id", "pad_token_id"),
        *("num_beams", "num_return_sequences", "early_stopping", "length_penalty", "return_dict_in_generate"),
        *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "stop_strings"),
    }
)
# Settings that change nothing here: descriptions, how transformers computes, and how fast greedy search is.
IGNORED = frozenset(
    {
        *("transformers_version", "bos_token_id", "_from_model_config", "remove_invalid_values", "renormalize_logits"),
        *("use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile", "low_memory"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    }
)
# Settings that change nothing without sampling.
SAMPLING_ONLY = frozenset({"min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"})
# Settings that cannot be combined with beams, and the values that switch them off.
WITHOUT_BEAMS = {
    **{"do_sample": False, "min_new_tokens": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
    "stop_strings": None,
}


class CT2EncDecSLM(ExportedModel):
    """A text model that CTranslate2 runs; load it with [`CT2EncDecSLM.from_pretrained`].

    Several threads may call [`generate`] at the same time; `inter_threads` of their calls run in parallel.

    Attributes:
        config ([`EncDecSLMConfig`]): Config of the exported model.
        generation_config ([`~transformers.GenerationConfig`]): Defaults of [`generate`].
        translator (`ctranslate2.Translator`): The engine. Its tokens are those of the tokenizer; an id without a token
            is named like `<id_7>`. It ends targets only at an `end_token`.
    """

    def __init__(self, translator, manifest, tokens, name_or_path):
        config = EncDecSLMConfig.from_dict(manifest["config"], name_or_path=name_or_path)
        super().__init__(config, GenerationConfig.from_dict(manifest["generation_config"]), manifest)
        self.translator = translator
        self._tokens = tokens
        self._ids = {token: token_id for token_id, token in enumerate(tokens)}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        device: str = "cpu",
        compute_type: str = "default",
        inter_threads: int = 1,
        intra_threads: int = 0,
        device_index: int | list[int] = 0,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> "CT2EncDecSLM":
        """Load an export.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Folder of the export, or a repository on the Hub that has
                it at its top or in `ctranslate2/`.
            device (`str`, *optional*, defaults to `"cpu"`): `"cpu"`, `"cuda"` or `"auto"`.
            compute_type (`str`, *optional*, defaults to `"default"`): Type of the computations, one of the
                `quantization` values of `export_ctranslate2`. `"default"` uses that of the export, or the nearest type
                that the device has: float32 for bfloat16 and float16 on a CPU without them, and `"int8_float32"` for
                `"int16"` and the other int8 types. CTranslate2 logs a warning about it.
            inter_threads (`int`, *optional*, defaults to 1): Number of calls that run in parallel.
            intra_threads (`int`, *optional*, defaults to 0): Number of threads of each call; 0 lets CTranslate2
                choose.
            device_index (`int` or `list[int]`, *optional*, defaults to 0): Which devices to use.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            subfolder (`str`, *optional*): Folder of the export within the repository or folder.

        Raises:
            ImportError: CTranslate2 is not installed.
            ValueError: There is no such export, a file is missing or incomplete, or the device or its `compute_type`
                is not available.
        """
        ctranslate2 = import_engine("ctranslate2")
        folder, manifest = find_export(
            pretrained_model_name_or_path, (FORMAT,), revision=revision, subfolder=subfolder
        )
        options = {"inter_threads": inter_threads, "intra_threads": intra_threads, "device_index": device_index}
        try:
            with _engine_folder(folder) as engine_folder:
                translator = ctranslate2.Translator(engine_folder, device=device, compute_type=compute_type, **options)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"CTranslate2 could not load {str(folder)!r} with `device` {device!r} and `compute_type` "
                f"{compute_type!r} ({summarize_error(error)}). Use other values, or export again."
            ) from error
        tokens = json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
        return cls(translator, manifest, tokens, str(folder))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the computations other than int8 products."""
        name = self.translator.compute_type.rpartition("_")[2]
        return getattr(torch, name) if name.startswith(("float", "bfloat")) else torch.float32

    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> torch.LongTensor | ModelOutput:
        """Generate as [`~transformers.GenerationMixin.generate`] of the exported model does.

        In float32, greedy targets are equal. Beams are CTranslate2's own: the search for a source ends when
        `num_beams` targets have ended, which transformers does with `early_stopping=True` (targets are equal then).
        Sampling uses CTranslate2's own random numbers; call `ctranslate2.set_random_seed` before loading the model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`): Sources, padded on either side.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): 1 for source tokens,
                0 for padding around them. `None` reads all.
            generation_config ([`~transformers.GenerationConfig`], *optional*): Settings, in place of keyword
                arguments.
            streamer ([`~transformers.generation.BaseStreamer`], *optional*): Receives the start token and then each
                token as soon as it is generated. For one source, without beams.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Required for `stop_strings`.
            kwargs: `max_new_tokens`, `max_length`, `min_new_tokens`, `min_length`, `eos_token_id`, `pad_token_id`,
                `num_return_sequences`, `return_dict_in_generate`; `num_beams` with `length_penalty`; or, without
                beams, `do_sample` with `temperature`, `top_k` and `top_p`, `repetition_penalty` and
                `no_repeat_ngram_size` (both ignore the start token), and `stop_strings`. They override
                `generation_config`, which overrides that of the export.

        Returns:
            `torch.LongTensor` of shape `(batch_size * num_return_sequences, target_length)`: Start token, target and
            end token, padded on the right, on the device of `input_ids`. With `return_dict_in_generate` a
            [`~transformers.utils.ModelOutput`] with `sequences` and, of beams, `sequences_scores`.

        Raises:
            ValueError: A setting is not supported, or a source has no tokens, padding between tokens, or an id that
                is not in the vocabulary.
            TypeError: `input_ids` is not a tensor of integers.
        """
        settings = self._resolve_settings(generation_config, kwargs)
        device = getattr(input_ids, "device", self.device)
        rows = self._tokenize_rows(input_ids, attention_mask)
        rows = [
            row for row in rows for _ in range(1 if settings["num_beams"] > 1 else settings["num_return_sequences"])
        ]
        if streamer is not None:
            _check_streamable(rows, settings)
        is_stopped = _build_stop_check(settings, tokenizer)
        if settings["num_beams"] > 1:
            targets, scores = self._search_beams(rows, settings)
        elif streamer is not None:
            targets, scores = [self._stream(rows[0], streamer, settings, is_stopped)], None
        else:
            options = _decoding_options(settings) | ({} if is_stopped is None else {"callback": is_stopped})
            results = self.translator.translate_batch(rows, **options)
            targets, scores = [self._to_ids(result.hypotheses[0]) for result in results], None
        sequences = self._pad(targets, settings).to(device)
        if not settings["return_dict_in_generate"]:
            return sequences
        if scores is None:
            return GenerateEncoderDecoderOutput(sequences=sequences)
        scores = torch.tensor(scores, device=device)
        return GenerateBeamEncoderDecoderOutput(sequences=sequences, sequences_scores=scores)

    def _resolve_settings(self, generation_config, kwargs):
        """Return every setting: from the call, the given config, the export or the defaults, in this order."""
        defaults = GenerationConfig._get_default_generation_params()
        settings: dict[str, Any] = {"stop_strings": None, **defaults}
        origins: dict[str, str] = {}
        configs = {
            "the generation config of the export": self.generation_config,
            "`generation_config`": generation_config,
        }
        for origin, config in configs.items():
            given = {} if config is None else config.to_dict()
            given = {name: value for name, value in given.items() if value is not None}
            settings |= given
            origins |= dict.fromkeys(given, origin)
        # None from the caller switches a setting off: no end token, no limit of the candidates.
        off = {**defaults, "top_k": 0}
        settings |= {name: off.get(name) if value is None else value for name, value in kwargs.items()}
        origins |= dict.fromkeys(kwargs, "the call")
        self._check_supported(settings, defaults, origins)
        settings["eos_token_id"] = list_ids(settings.get("eos_token_id"))
        if settings.get("pad_token_id") is None:
            settings["pad_token_id"] = next(iter(settings["eos_token_id"]), None)
        # Lengths count the start token, numbers of new tokens do not.
        for name in ("max", "min"):
            if settings.get(f"{name}_new_tokens") is None:
                settings[f"{name}_new_tokens"] = max(settings[f"{name}_length"] - 1, 0)
                origins[f"{name}_new_tokens"] = origins.get(f"{name}_length", "the default")
        _check_settings(settings, origins)
        settings["top_k"] = min(settings["top_k"], self.config.vocab_size)
        return settings

    def _check_supported(self, settings, defaults, origins):
        accepted = SUPPORTED | IGNORED | (frozenset() if settings.get("do_sample") else SAMPLING_ONLY)
        neutral = {**defaults, "decoder_start_token_id": start_token_id(self.generation_config)}
        neutral |= {"guidance_scale": 1.0, "penalty_alpha": 0.0}
        refused = [
            f"`{name}` ({value!r:.60}, from {origins[name]})"
            for name, value in settings.items()
            if name not in accepted and not _is_neutral(value, neutral.get(name))
        ]
        if refused:
            raise ValueError(
                f"CTranslate2 does not support {format_list(refused)}. Leave it out, set it to None, or generate with "
                f"the model in transformers. Supported: {', '.join(sorted(SUPPORTED))}."
            )

    def _tokenize_rows(self, input_ids, attention_mask):
        """Return the tokens of each source, without padding."""
        input_ids, attention_mask = self._move(input_ids), self._move(attention_mask)
        check_token_ids(input_ids, "input_ids", self.config)
        check_attention_mask(attention_mask, input_ids.shape)
        mask = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        _check_mask(mask)
        return [
            [self._tokens[token_id] for token_id in row[is_read].tolist()]
            for row, is_read in zip(input_ids, mask, strict=True)
        ]

    def _to_ids(self, tokens):
        return [self._ids[token] for token in tokens]

    def _search_beams(self, rows, settings):
        results = self.translator.translate_batch(
            rows,
            beam_size=settings["num_beams"],
            num_hypotheses=settings["num_return_sequences"],
            length_penalty=settings["length_penalty"],
            return_scores=True,
            **_stopping_options(settings),
        )
        targets = [self._to_ids(tokens) for result in results for tokens in result.hypotheses]
        return targets, [score for result in results for score in result.scores]

    def _stream(self, row, streamer, settings, is_stopped):
        """Generate for one source; give each token to `streamer` in this thread as soon as it is there."""
        streamer.put(torch.tensor([[start_token_id(self.generation_config)]]))
        options, target = _decoding_options(settings), []
        del options["beam_size"], options["return_end_token"]
        # A reader that stops early stops the engine too.
        with contextlib.closing(self.translator.generate_tokens(row, **options)) as steps:
            for step in steps:
                target.append(step.token_id)
                streamer.put(torch.tensor([step.token_id]))
                if is_stopped is not None and is_stopped(step):
                    break
        streamer.end()
        return target

    def _pad(self, targets, settings):
        start_id = start_token_id(self.generation_config)
        pad_id = settings["pad_token_id"]
        if settings["num_beams"] > 1 and not pad_id:
            # Beam search in transformers takes a padding id of 0 for none.
            pad_id = next(iter(settings["eos_token_id"]), -1)
        longest = max(map(len, targets), default=0)
        rows = [[start_id, *target, *[pad_id] * (longest - len(target))] for target in targets]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), longest + 1)


def _is_neutral(value, default):
    is_empty = value is None or value is False or (isinstance(value, (list, tuple, dict)) and not value)
    return (is_empty and not default) or (not isinstance(value, torch.Tensor) and value == default)


@contextlib.contextmanager
def _engine_folder(folder):
    """Yield a folder with the model in which no token is a special one, for as long as it is loaded.

    Otherwise CTranslate2 takes sources such as a lone end token for empty ones, and generates nothing.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        for name in (WEIGHTS_FILE, VOCABULARY_FILE):
            try:
                os.symlink((folder / name).absolute(), Path(temporary, name))
            except OSError:  # not every file system and user can make links
                shutil.copy(folder / name, temporary)
        config |= {"bos_token": NO_TOKEN, "eos_token": NO_TOKEN}
        Path(temporary, "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield temporary


def _stopping_options(settings):
    return {
        "end_token": settings["eos_token_id"] or [NO_TOKEN_ID],
        "return_end_token": True,
        "max_decoding_length": settings["max_new_tokens"],
        "min_decoding_length": settings["min_new_tokens"] if settings["eos_token_id"] else 0,
        "max_input_length": 0,
    }


def _decoding_options(settings):
    options = {
        "beam_size": 1,
        "repetition_penalty": settings["repetition_penalty"],
        "no_repeat_ngram_size": settings["no_repeat_ngram_size"],
        **_stopping_options(settings),
    }
    if settings["do_sample"]:
        options["sampling_topk"] = settings["top_k"]
        options["sampling_topp"] = settings["top_p"]
        options["sampling_temperature"] = settings["temperature"]
    return options


def _build_stop_check(settings, tokenizer) -> Callable[[Any], bool] | None:
    """Return a callback of CTranslate2 that stops a row at its first stop string, as transformers does."""
    if not settings["stop_strings"]:
        return None
    if tokenizer is None:
        raise ValueError(
            "`stop_strings` is given without `tokenizer`, but finding them requires it. Pass `tokenizer`."
        )
    criteria = StopStringCriteria(tokenizer, settings["stop_strings"])
    rows = defaultdict(list)

    def is_stopped(step):
        rows[step.batch_id].append(step.token_id)
        return bool(criteria(torch.tensor([rows[step.batch_id]]), None))

    return is_stopped


def _check_mask(mask):
    lengths = mask.sum(1)
    if (lengths == 0).any():
        raise ValueError(
            f"Source {lengths.argmin()} (from 0) has no token that is read, but the encoder needs one. Leave it out."
        )
    last = (torch.arange(mask.shape[1]) * mask).amax(1)
    if (has_gap := last - mask.int().argmax(1) + 1 != lengths).any():
        raise ValueError(
            f"Source {has_gap.int().argmax()} (from 0) has masked tokens between others, which CTranslate2 has no "
            "mask for. Pad on the left or right only, or generate with the model in transformers."
        )


def _check_streamable(rows, settings):
    if len(rows) != 1 or settings["num_beams"] > 1:
        raise ValueError(
            f"`streamer` is given for {len(rows)} targets with `num_beams` {settings['num_beams']}, but only one "
            "target without beams is streamed. Call `generate` once for each source, or leave `streamer` out."
        )


def _check_settings(settings, origins):
    num_beams, num_returned = settings["num_beams"], settings["num_return_sequences"]
    if settings["max_new_tokens"] < 1:
        raise ValueError(f"`max_new_tokens` is {settings['max_new_tokens']}, but must be at least 1.")
    if not settings["do_sample"] and num_returned > num_beams:
        raise ValueError(
            f"`num_return_sequences` ({num_returned}) is greater than `num_beams` ({num_beams}). Set `num_beams` to "
            "it, or `do_sample=True`."
        )
    if num_beams > 1:
        _check_beams(settings, origins)
    if settings["do_sample"] and not (
        settings["temperature"] > 0 and 0 < settings["top_p"] <= 1 and settings["top_k"] >= 0
    ):
        raise ValueError(
            f"`temperature` is {settings['temperature']}, `top_p` {settings['top_p']}, `top_k` {settings['top_k']}, "
            "but sampling needs `temperature` above 0, `top_p` above 0 and at most 1, and `top_k` 0 (all) or more."
        )


def _check_beams(settings, origins):
    if settings["early_stopping"] not in (True, False):
        raise ValueError(
            f"`early_stopping` is {settings['early_stopping']!r}, but CTranslate2 always ends a search when "
            "`num_beams` targets have ended. Leave it out, or generate with the model in transformers."
        )
    given = {name: off for name, off in WITHOUT_BEAMS.items() if (settings[name] or off) != off}
    if not given:
        return
    names = ", ".join(f"`{name}` ({settings[name]!r}, from {origins[name]})" for name in given)
    values = ", ".join(f"`{name}={off!r}`" for name, off in given.items())
    raise ValueError(
        f"`num_beams` is {settings['num_beams']}, but CTranslate2 cannot combine beams with {names}: candidates would "
        f"get other scores than in transformers. Pass {values}, or `num_beams=1`."
    )
