# SPDX-License-Identifier: Apache-2.0
"""A CTranslate2 export with the face of a model: ids in, ids out, in our pipeline too."""

import contextlib
import json
import os
import queue
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput, GenerateEncoderDecoderOutput
from transformers.utils import ModelOutput

from ..checkpoint_folders import first_line, local_folder
from ..configuration_encdec_slm import EncDecSLMConfig
from .bundles import check_tokenizer, read_manifest, required
from .ctranslate2_beams import beam_search
from .ctranslate2_converter import FORMAT, NO_TOKEN, VOCABULARY_FILE, WEIGHTS_FILE, listed_ids, start_token_id


# Larger than any vocabulary.
NO_TOKEN_ID = 2**31 - 1
# What CTranslate2 decides as transformers does. Everything else has to keep the value that changes nothing.
HONOURED = frozenset(
    {
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "eos_token_id", "pad_token_id"),
        *("num_beams", "num_return_sequences", "early_stopping", "length_penalty", "return_dict_in_generate"),
        *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size"),
    }
)
# Fields of a generation config that are no request: what it was written by, and ids that only other settings read.
NO_REQUESTS = frozenset({"transformers_version", "bos_token_id", "_from_model_config"})


class CT2EncDecSLM:
    """A text model of this family that CTranslate2 runs, with the part of a model's face that generates.

    Several threads may call [`generate`] at the same time; `inter_threads` of their calls are computed at once.

    Attributes:
        config ([`EncDecSLMConfig`]): Of the model that was exported.
        generation_config ([`~transformers.GenerationConfig`]): Defaults of [`generate`].
        translator (`ctranslate2.Translator`): The engine, for what is not offered here. Its tokens are those of the
            tokenizer; where an id has no token, `<id_7>` stands for id 7. It ends targets only at an `end_token`.
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)
    output_modalities = ("text",)

    def __init__(self, translator, manifest, tokens):
        self.translator = translator
        self.config = EncDecSLMConfig.from_dict(manifest["config"])
        self.generation_config = GenerationConfig.from_dict(manifest["generation_config"])
        self._manifest = manifest
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
    ) -> "CT2EncDecSLM":
        """The model in a folder that `export_ctranslate2` wrote.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): The folder, or the name of a repository on the Hub that
                has its files.
            device (`str`, *optional*, defaults to `"cpu"`): `"cpu"`, `"cuda"` or `"auto"`.
            compute_type (`str`, *optional*, defaults to `"default"`): What is computed in, one of the export's
                `quantization` values. `"default"` means that of the export, and where the device lacks it the nearest
                one that it has: on a CPU without bfloat16 and float16 units float32 for these two, and
                `"int8_float32"` for the `int8_...` ones and `int16`. CTranslate2 logs a warning of it.
            inter_threads (`int`, *optional*, defaults to 1): Calls that are computed at the same time.
            intra_threads (`int`, *optional*, defaults to 0): Threads of each of them; 0 lets CTranslate2 choose.
            device_index (`int` or `list[int]`, *optional*, defaults to 0): Which devices, where there are several.

        Raises:
            ImportError: CTranslate2 is not installed.
            ValueError: The folder is no such export, or a file of it is missing or cut off; the device is not there,
                or does not have an explicit `compute_type`.
        """
        ctranslate2 = required("ctranslate2")
        folder = local_folder(pretrained_model_name_or_path, ("*",))
        manifest = read_manifest(folder, FORMAT)
        options = {"inter_threads": inter_threads, "intra_threads": intra_threads, "device_index": device_index}
        try:
            with _engine_folder(folder) as engine_folder:
                translator = ctranslate2.Translator(engine_folder, device=device, compute_type=compute_type, **options)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"CTranslate2 cannot load {str(folder)!r} with `device` {device!r} and `compute_type` "
                f"{compute_type!r} ({first_line(error)}). Give others, or export again."
            ) from error
        return cls(translator, manifest, json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8")))

    @property
    def device(self) -> torch.device:
        """Where ids are wanted: on the CPU, wherever the model is computed (`translator.device`)."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in beside int8 products."""
        name = self.translator.compute_type.rpartition("_")[2]
        return getattr(torch, name) if name.startswith(("float", "bfloat")) else torch.float32

    @property
    def name_or_path(self) -> str:
        return self.config.name_or_path

    def can_generate(self) -> bool:
        return True

    def to(self, device: str | torch.device) -> "CT2EncDecSLM":
        """This model, if it is asked for where it is.

        Raises:
            ValueError: Another device is asked for.
        """
        if torch.device(device) != self.device:
            raise ValueError(
                f"`device` is {str(device)!r}, but a loaded CTranslate2 model stays where it is. Give `device` to "
                "`CT2EncDecSLM.from_pretrained`, and none to the pipeline."
            )
        return self

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses a tokenizer that is not the one of the export.

        Raises:
            ValueError: Its ids mean other tokens.
        """
        check_tokenizer(self._manifest, tokenizer)

    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs,
    ) -> torch.LongTensor | ModelOutput:
        """Targets as [`~transformers.GenerationMixin.generate`] of the exported model gives them.

        In float32 they are the same: greedy ones, and beams for either `early_stopping`. `early_stopping=True` takes
        one pass, as CTranslate2 stops by itself; `False`, the default of transformers, searches on by its rule, which
        takes a pass or two more where targets end before the limit. Sampling draws from CTranslate2's own random
        numbers: `ctranslate2.set_random_seed` before the model is loaded.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`): Sources, padded on either side.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): 1 for source tokens,
                0 for padding around them. `None` reads all.
            generation_config ([`~transformers.GenerationConfig`], *optional*): In place of keyword arguments.
            streamer ([`~transformers.generation.BaseStreamer`], *optional*): Gets the start token and then each token
                while the next is computed. For one source, without beams.
            kwargs: `max_new_tokens`, `max_length`, `min_new_tokens`, `min_length`, `eos_token_id`, `pad_token_id`,
                `num_return_sequences`, `return_dict_in_generate`; `num_beams` with `early_stopping` and
                `length_penalty`; `do_sample` with `temperature`, `top_k` and `top_p`; `repetition_penalty` and
                `no_repeat_ngram_size` (without beams; the start token is not counted among the tokens so far). They
                come on top of `generation_config` and the model's own.

        Returns:
            `torch.LongTensor` of shape `(batch_size * num_return_sequences, target_length)`: Start token, target and
            end-of-text token, padded on the right; on the device of `input_ids`. With `return_dict_in_generate` a
            [`~transformers.utils.ModelOutput`] with `sequences` and, of beams, `sequences_scores`.

        Raises:
            ValueError: A setting is one that CTranslate2 does not honour; a source has no token, tokens between
                padding, or an id that the model does not have.
        """
        settings = self._settings(generation_config, kwargs)
        rows = self._rows(input_ids, attention_mask)
        if streamer is not None:
            _check_streamable(rows, settings)
            targets, scores = [self._stream(rows[0], streamer, settings)], None
        elif settings["num_beams"] > 1:
            targets, scores = beam_search(self._beams(settings), rows, settings)
        else:
            rows = [row for row in rows for _ in range(settings["num_return_sequences"])]
            results = self.translator.translate_batch(rows, **_decoding_options(settings))
            targets, scores = [self._to_ids(result.hypotheses[0]) for result in results], None
        sequences = self._padded(targets, settings).to(input_ids.device)
        if not settings["return_dict_in_generate"]:
            return sequences
        if scores is None:
            return GenerateEncoderDecoderOutput(sequences=sequences)
        return GenerateBeamEncoderDecoderOutput(
            sequences=sequences, sequences_scores=torch.tensor(scores, device=input_ids.device)
        )

    def _settings(self, generation_config, kwargs):
        """Every generation setting: of the call, else of the given config, else of the model, else the default."""
        defaults = GenerationConfig._get_default_generation_params()
        settings: dict[str, Any] = dict(defaults)
        for config in (self.generation_config, generation_config):
            given = {} if config is None else config.to_dict()
            settings |= {name: value for name, value in given.items() if value is not None}
        # None from the caller turns a setting off: nothing ends a text, all tokens are drawn from.
        off = {**defaults, "top_k": 0}
        settings |= {name: off.get(name) if value is None else value for name, value in kwargs.items()}
        self._check_honoured(settings, defaults)
        settings["eos_token_id"] = listed_ids(settings.get("eos_token_id"))
        if settings.get("pad_token_id") is None:
            settings["pad_token_id"] = next(iter(settings["eos_token_id"]), None)
        # In lengths the token counts that every target begins with, in numbers of new tokens it does not.
        for name in ("max", "min"):
            if settings.get(f"{name}_new_tokens") is None:
                settings[f"{name}_new_tokens"] = max(settings[f"{name}_length"] - 1, 0)
        _check_settings(settings)
        settings["top_k"] = min(settings["top_k"], self.config.vocab_size)
        return settings

    def _check_honoured(self, settings, defaults):
        neutral = {**defaults, "decoder_start_token_id": start_token_id(self.generation_config)}
        refused = [
            f"`{name}` ({value!r:.60})"
            for name, value in settings.items()
            if name not in HONOURED | NO_REQUESTS
            and value is not None
            and value != neutral.get(name)
            and not (value is False and name not in neutral)
        ]
        if refused:
            raise ValueError(
                f"{', '.join(refused)} cannot be honoured by a CTranslate2 model, which takes "
                f"{', '.join(sorted(HONOURED))}. Leave it out, or generate with the model in transformers."
            )

    def _rows(self, input_ids, attention_mask):
        """The tokens of each source, without padding."""
        _check_ids(input_ids, self.config.vocab_size)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `input_ids` {tuple(input_ids.shape)}: "
                "it has to say of each token whether it is read."
            )
        mask = attention_mask.bool().cpu()
        _check_mask(mask)
        return [
            [self._tokens[token_id] for token_id in row[read].tolist()]
            for row, read in zip(input_ids.cpu(), mask, strict=True)
        ]

    def _to_ids(self, tokens):
        return [self._ids[token] for token in tokens]

    def _beams(self, settings):
        """What [`beam_search`] calls: ids of every target that ended within `most` tokens, and its log-probability."""

        def decode(rows, most, patience):
            results = self.translator.translate_batch(
                rows,
                beam_size=settings["num_beams"],
                patience=patience,
                num_hypotheses=round(settings["num_beams"] * patience),
                length_penalty=settings["length_penalty"],
                return_scores=True,
                **_stopping_options(settings, most),
            )
            return [
                [(self._to_ids(tokens), score) for tokens, score in zip(result.hypotheses, result.scores, strict=True)]
                for result in results
            ]

        return decode

    def _stream(self, row, streamer, settings):
        """The target of one source, each token given to `streamer` in this thread as soon as it is there."""
        streamer.put(torch.tensor([[start_token_id(self.generation_config)]]))
        target = []
        with contextlib.closing(self._streamed_ids(row, settings)) as token_ids:
            for token_id in token_ids:
                target.append(token_id)
                streamer.put(torch.tensor([token_id]))
        streamer.end()
        return target

    def _streamed_ids(self, row, settings) -> Iterator[int]:
        steps: queue.SimpleQueue = queue.SimpleQueue()
        is_abandoned = False

        def on_token(step):
            steps.put(step)
            return is_abandoned

        (result,) = self.translator.translate_batch(
            [row], asynchronous=True, callback=on_token, **_decoding_options(settings)
        )
        try:
            is_last = False
            while not is_last:
                step = _next_step(steps, result)
                is_last = step.is_last
                yield step.token_id
        finally:
            # Whoever stops reading stops the engine too.
            is_abandoned = True
            result.result()

    def _padded(self, targets, settings):
        start_id = start_token_id(self.generation_config)
        pad_id = settings["pad_token_id"]
        if settings["num_beams"] > 1 and not pad_id:
            # The beam search of transformers takes padding 0 for none at all.
            pad_id = next(iter(settings["eos_token_id"]), -1)
        longest = max(map(len, targets), default=0)
        rows = [[start_id, *target, *[pad_id] * (longest - len(target))] for target in targets]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), longest + 1)


@contextlib.contextmanager
def _engine_folder(folder):
    """A folder with the model where no token has the role of beginning or end, for as long as it is loaded.

    CTranslate2 takes sources such as a lone end-of-text token for empty ones and writes nothing, and the model does
    not. What ends a target is said at every call.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        for name in (WEIGHTS_FILE, VOCABULARY_FILE):
            try:
                os.symlink((folder / name).absolute(), Path(temporary, name))
            except OSError:  # not every file system has links, nor may everybody make them
                shutil.copy(folder / name, temporary)
        config |= {"bos_token": NO_TOKEN, "eos_token": NO_TOKEN}
        Path(temporary, "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield temporary


def _stopping_options(settings, most):
    return {
        "end_token": settings["eos_token_id"] or [NO_TOKEN_ID],
        "return_end_token": True,
        "max_decoding_length": most,
        "min_decoding_length": settings["min_new_tokens"] if settings["eos_token_id"] else 0,
        "max_input_length": 0,
    }


def _decoding_options(settings):
    options = {
        "beam_size": 1,
        "repetition_penalty": settings["repetition_penalty"],
        "no_repeat_ngram_size": settings["no_repeat_ngram_size"],
        **_stopping_options(settings, settings["max_new_tokens"]),
    }
    if settings["do_sample"]:
        options["sampling_topk"] = settings["top_k"]
        options["sampling_topp"] = settings["top_p"]
        options["sampling_temperature"] = settings["temperature"]
    return options


def _next_step(steps, result):
    """The next token, or the error that ended the search."""
    while True:
        try:
            return steps.get(timeout=1)
        except queue.Empty:
            if result.done() and steps.empty():
                result.result()
                raise RuntimeError("CTranslate2 ended without a last token.") from None


def _check_ids(input_ids, vocab_size):
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        shape = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(
            f"`input_ids` is {shape}, but must be a tensor of ids of shape (sources, tokens). Use "
            '`tokenizer(texts, padding=True, return_tensors="pt")`.'
        )
    if input_ids.numel() and not 0 <= input_ids.min() <= input_ids.max() < vocab_size:
        raise ValueError(
            f"`input_ids` has ids from {input_ids.min()} to {input_ids.max()}, but the vocabulary has ids 0 to "
            f"{vocab_size - 1}. Use the tokenizer of this model."
        )


def _check_mask(mask):
    lengths = mask.sum(1)
    if (lengths == 0).any():
        raise ValueError(
            f"Source {lengths.argmin()} (from 0) has no token that is read, but the encoder needs one. Leave it out."
        )
    positions = torch.arange(mask.shape[1])
    first = mask.int().argmax(1)
    last = (positions * mask).amax(1)
    if (split := last - first + 1 != lengths).any():
        raise ValueError(
            f"Source {split.int().argmax()} (from 0) has tokens that are not read between others that are, which "
            "CTranslate2 has no mask for. Pad on the left or right only, or generate with the model in transformers."
        )


def _check_streamable(rows, settings):
    if len(rows) != 1 or settings["num_beams"] > 1 or settings["num_return_sequences"] > 1:
        raise ValueError(
            f"`streamer` is given with {len(rows)} sources, `num_beams` {settings['num_beams']} and "
            f"`num_return_sequences` {settings['num_return_sequences']}, but only one target is streamed. Call "
            "`generate` once for each source, from several threads if you like, or leave `streamer` out."
        )


def _check_settings(settings):
    num_beams, num_returned = settings["num_beams"], settings["num_return_sequences"]
    if settings["max_new_tokens"] < 1:
        raise ValueError(
            f"`max_new_tokens` comes to {settings['max_new_tokens']}, but at least one token has to be written."
        )
    if not settings["do_sample"] and num_returned > num_beams:
        raise ValueError(
            f"`num_return_sequences` ({num_returned}) is more than `num_beams` ({num_beams}): there are no more "
            "targets. Set `num_beams` to it, or `do_sample=True`."
        )
    if num_beams > 1 and settings["early_stopping"] not in (True, False):
        raise ValueError(
            f"`early_stopping` is {settings['early_stopping']!r}, but a CTranslate2 model takes True or False. Set it "
            "to one of them, or generate with the model in transformers."
        )
    neutral = {"do_sample": False, "min_new_tokens": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    odd = [f"`{name}`" for name, value in neutral.items() if settings[name] != value]
    if num_beams > 1 and odd:
        raise ValueError(
            f"{', '.join(odd)} cannot be honoured together with `num_beams` ({num_beams}): CTranslate2 changes scores "
            "before it makes probabilities of them, transformers afterwards. Leave one out, or generate with the "
            "model in transformers."
        )
    if settings["do_sample"] and not (
        settings["temperature"] > 0 and 0 < settings["top_p"] <= 1 and settings["top_k"] >= 0
    ):
        raise ValueError(
            f"`temperature` is {settings['temperature']}, `top_p` {settings['top_p']}, `top_k` {settings['top_k']}, "
            "but sampling needs `temperature` above 0, `top_p` above 0 and at most 1, and `top_k` 0 (all) or more."
        )
