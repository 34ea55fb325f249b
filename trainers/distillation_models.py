# SPDX-License-Identifier: Apache-2.0
"""Load student, teacher and their tokenizers for a distillation run, and check them against each other."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..checkpoints import check_hub_name, load_checkpoint
from ..errors import summarize_error
from .causal_models import LOCATION_ARGUMENTS, load_causal_model, not_causal_message
from .distillation_config import Seq2SeqDistillationConfig
from .teacher_cache import TeacherCache
from .token_alignment import TokenAlignment
from .vocabulary import count_common_tokens, find_teacher_token_ids


logger = logging.getLogger(__name__)

SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")

Tokenizer = PreTrainedTokenizerBase | ProcessorMixin


def check_args(args: Any, model: Any, compute_metrics: Any) -> Seq2SeqDistillationConfig:
    """Return the settings of a run, or default settings for `None`.

    Raises:
        TypeError: `args` is of another class.
        ValueError: Completions are scored but not generated.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path or model.config.model_type
        args = Seq2SeqDistillationConfig(f"{name.rstrip('/').split('/')[-1]}-Distillation")
    if not isinstance(args, Seq2SeqDistillationConfig):
        raise TypeError(f"`args` must be a Seq2SeqDistillationConfig, got {type(args).__name__}.")
    if compute_metrics is not None and not args.predict_with_generate:
        raise ValueError("`compute_metrics` scores generated completions and requires `predict_with_generate=True`.")
    return args


# Student


def load_student(
    model: str | PreTrainedModel,
    args: Seq2SeqDistillationConfig,
    quantization_config: Any = None,
    peft_config: Any = None,
) -> tuple[PreTrainedModel, Tokenizer | None]:
    """Load the student if it is a string; the training of a LoRA adapter continues.

    Returns:
        `tuple`: The student, and the tokenizer or processor from the same place; `None` if there is none.

    Raises:
        ValueError: The string is not an encoder-decoder, nothing of the student can be trained, or an argument would
            have no effect.
    """
    if not isinstance(model, str):
        if args.model_init_kwargs is not None or quantization_config is not None:
            raise ValueError(
                "`model_init_kwargs` and `quantization_config` require `model` to be a string, but the student is "
                f"already loaded ({type(model).__name__}). Remove them, or pass the student as a string."
            )
        student, processing_class = model, None
    else:
        defaults = {"dtype": "float32", "trust_remote_code": args.trust_remote_code}
        kwargs = {**defaults, **_rename_dtype(args.model_init_kwargs)}
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        student, processing_class = load_checkpoint(model, adapter="train", **_without_device_map(kwargs, args))
    if peft_config is not None and _adapters_of(student):
        name = model if isinstance(model, str) else type(model).__name__
        raise ValueError(
            f"The student {name!r} has an adapter already, and `peft_config` would add another one. Remove "
            "`peft_config` to continue the training of the adapter, or merge it first (`merge_and_unload`)."
        )
    if peft_config is None and not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            f"The student {type(student).__name__} has no trainable parameters. Load an adapter with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`, or pass its folder as `model`."
        )
    return student, processing_class


# Teacher


def load_teacher(
    teacher: str | PreTrainedModel | None, args: Seq2SeqDistillationConfig
) -> tuple[PreTrainedModel | None, dict[str, Any]]:
    """Load the teacher if it is a string, which may be the name of a LoRA adapter.

    Returns:
        `tuple`: The teacher, and where it comes from, as arguments of `from_pretrained`. Training by cross-entropy
        alone (`kd_ratio=0` without `seq_kd`) needs no teacher, so it may be `None`.

    Raises:
        ValueError: A teacher is needed and not given, it is not a causal language model, or an argument would have no
            effect.
    """
    name = args.teacher_model_name_or_path
    if teacher is None and name is None:
        if args.kd_ratio == 0 and not args.seq_kd:
            return None, {}
        raise ValueError(
            "A teacher is required. Pass `teacher_model`, a causal language model or the name of one, or set "
            "`teacher_model_name_or_path`."
        )
    if teacher is not None and name is not None and teacher != name:
        logger.warning(f"`teacher_model_name_or_path` ({name!r}) is not used, because `teacher_model` is given.")
    teacher = name if teacher is None else teacher
    if not isinstance(teacher, str):
        for setting in ("teacher_model_init_kwargs", "teacher_model_revision"):
            if getattr(args, setting) is not None:
                raise ValueError(
                    f"`{setting}` requires `teacher_model` to be a string, but the teacher is already loaded "
                    f"({type(teacher).__name__}). Remove it, or pass the teacher as a string."
                )
        return teacher, {"pretrained_model_name_or_path": teacher.config._name_or_path}
    kwargs = {"dtype": "auto", "trust_remote_code": args.trust_remote_code}
    if args.teacher_model_revision is not None:
        kwargs["revision"] = args.teacher_model_revision
    kwargs |= _rename_dtype(args.teacher_model_init_kwargs)
    if Path(teacher).is_dir():  # transformers ignores the subfolder of a local adapter
        teacher = str(Path(teacher, kwargs.pop("subfolder", "")))
    elif "token" not in kwargs:
        kwargs["local_files_only"] = not check_hub_name(teacher, kwargs.get("revision"))
    location = {name: kwargs[name] for name in LOCATION_ARGUMENTS if name in kwargs}
    try:
        model = load_causal_model(teacher, **_without_device_map(kwargs, args))
    except (OSError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(f"The teacher {teacher!r} could not be loaded ({summarize_error(error)}).") from error
    return model, {"pretrained_model_name_or_path": teacher, **location}


def load_teacher_cache(
    teacher_cache: TeacherCache | str | None, teacher: str | PreTrainedModel | None, args: Seq2SeqDistillationConfig
) -> TeacherCache | None:
    """Load the teacher cache of a run, if it has one.

    Raises:
        ValueError: The cache is damaged, there is a teacher too, or the cache does not serve the objective.
    """
    teacher_cache = args.teacher_cache if teacher_cache is None else teacher_cache
    if teacher_cache is None:
        return None
    if teacher is not None:
        raise ValueError("`teacher_model` and `teacher_cache` are both given. Remove one of them.")
    cache = teacher_cache if isinstance(teacher_cache, TeacherCache) else TeacherCache(teacher_cache)
    spec = cache.distributions
    if args.kd_ratio > 0 and spec is None:
        raise ValueError(
            f"The teacher cache {str(cache.folder)!r} has completions but no distributions, so `kd_ratio` must be 0, "
            f"got {args.kd_ratio}."
        )
    if args.kd_ratio > 0 and spec.kind == "sampled" and args.beta != 0.0:
        raise ValueError(
            f"`beta` must be 0 (forward KL) for the drawn tokens ({spec}) of a teacher cache, got {args.beta}. For "
            "other divergences label with `topk`."
        )
    return cache


def _rename_dtype(kwargs):
    """Rename `torch_dtype`, which `from_pretrained` ignores beside `dtype`."""
    return {("dtype" if name == "torch_dtype" else name): value for name, value in (kwargs or {}).items()}


def _without_device_map(kwargs, args):
    """Remove the device map in a distributed run, where each process has a whole model."""
    is_distributed = args.distributed_state is not None and args.distributed_state.num_processes > 1
    return {**kwargs, "device_map": None} if is_distributed else kwargs


# Roles


def check_roles(student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Check that the student is an encoder-decoder and the teacher, if there is one, a causal language model.

    Raises:
        ValueError: One is of another kind, or the teacher is a prompt-tuned model.
    """
    if not getattr(student.config, "is_encoder_decoder", False) or not _can_generate(student):
        raise ValueError(
            f"The student {type(student).__name__} must be an encoder-decoder with an output head. Use a model that "
            "`AutoModelForSeq2SeqLM` loads; for a decoder-only student use TRL's DistillationTrainer."
        )
    if teacher is None:
        return
    # Encoders such as BERT, which read what they would predict, have `is_decoder=False`.
    is_other = getattr(teacher.config, "is_encoder_decoder", False) or not getattr(teacher.config, "is_decoder", True)
    if is_other or not _can_generate(teacher):
        raise ValueError(not_causal_message(type(teacher).__name__))
    if any(getattr(config, "is_prompt_learning", False) for config in _adapters_of(teacher).values()):
        raise ValueError(
            "The teacher is tuned by virtual tokens (prompt or prefix tuning), which would shift its positions. Use a "
            "LoRA adapter or a whole model."
        )


def _adapters_of(model):
    return getattr(model, "peft_config", None) or {}


def _can_generate(model):
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).can_generate()


# Tokenizers


def load_processing_classes(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    processing_class: Tokenizer | None,
    teacher_processing_class: Tokenizer | None,
    teacher_location: dict[str, Any],
    args: Seq2SeqDistillationConfig,
) -> tuple[Tokenizer, Tokenizer]:
    """Return tokenizers of student and teacher, or processors of those that read images, loaded if not given.

    Without a teacher, both are the student's.

    Raises:
        TypeError: One is of another kind.
        ValueError: The student's cannot be found, has no end-of-text token, or has another image token.
    """
    has_images = _has_images(student)
    teacher_has_images = has_images and teacher is not None and _has_images(teacher)
    location = {"pretrained_model_name_or_path": student.config._name_or_path}
    if processing_class is None:
        processing_class = _load_processing_class(location, has_images, args)
    if processing_class is None:
        raise ValueError(
            f"There is no tokenizer in the folder of the student ({student.config._name_or_path!r}). Pass one as "
            "`processing_class`."
        )
    if teacher is None:
        teacher_processing_class = get_tokenizer(processing_class)
    elif teacher_processing_class is None:
        teacher_processing_class = load_teacher_processing_class(teacher, teacher_location, args, teacher_has_images)
    if teacher_processing_class is None:
        logger.warning("There is no tokenizer in the folder of the teacher. The student's is used for the teacher.")
        teacher_processing_class = get_tokenizer(processing_class)
    kind = ProcessorMixin if has_images else PreTrainedTokenizerBase
    _check_kind("processing_class", processing_class, student, (kind,))
    # A teacher that could read images may be given text about them.
    kinds = (PreTrainedTokenizerBase, ProcessorMixin) if teacher_has_images else (PreTrainedTokenizerBase,)
    _check_kind("teacher_processing_class", teacher_processing_class, teacher, kinds)
    are_ends_aligned = args.token_alignment == "byte_spans"
    return _with_padding(processing_class, teacher_processing_class, are_ends_aligned), teacher_processing_class


def load_teacher_processing_class(
    teacher: PreTrainedModel, location: dict[str, Any], args: Seq2SeqDistillationConfig, has_images: bool = False
) -> Tokenizer | None:
    """Load the tokenizer of a teacher, or the processor of one that reads images; `None` if there is none.

    Args:
        teacher ([`~transformers.PreTrainedModel`]): An adapter without a tokenizer has that of its base model.
        location (`dict`): From [`load_teacher`].
        args ([`Seq2SeqDistillationConfig`]): Settings of the run.
        has_images (`bool`, *optional*, defaults to `False`): Whether the teacher reads the images of rows.
    """
    base = {"pretrained_model_name_or_path": teacher.config._name_or_path}
    found = _load_processing_class(location, has_images, args)
    return _load_processing_class(base, has_images, args) if found is None else found


def _with_padding(processing_class, teacher_processing_class, are_ends_aligned):
    """Return the student's tokenizer with a padding token; warn if the two models end texts differently."""
    tokenizer, teacher_tokenizer = get_tokenizer(processing_class), get_tokenizer(teacher_processing_class)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The student's tokenizer has no end-of-text token, so the student cannot learn to stop. Set its "
            "`eos_token`."
        )
    if teacher_tokenizer.eos_token != tokenizer.eos_token and not are_ends_aligned:
        logger.warning(
            f"The student's end-of-text token is {tokenizer.eos_token!r} and the teacher's is "
            f"{teacher_tokenizer.eos_token!r}, so the teacher predicts another token at the end of a text than the "
            "student learns. If both have the teacher's, make it the `eos_token` of the student's tokenizer."
        )
    if tokenizer.pad_token is None:
        processing_class = copy.deepcopy(processing_class)
        get_tokenizer(processing_class).pad_token = tokenizer.eos_token
    return processing_class


def get_tokenizer(processing_class: Tokenizer) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def _has_images(model):
    return getattr(model.config, "image_token_id", None) is not None


def _check_kind(name, value, model, kinds):
    if not isinstance(value, kinds):
        needed = "tokenizer" if kinds[0] is PreTrainedTokenizerBase else "processor"
        raise TypeError(f"`{name}` must be the {needed} of {type(model).__name__}, got {type(value).__name__}.")
    if isinstance(value, ProcessorMixin) and value.image_token_id != model.config.image_token_id:
        raise ValueError(
            f"`{name}` has the image token id {value.image_token_id}, but the `image_token_id` of "
            f"{type(model).__name__} is {model.config.image_token_id}. Use the processor of the model."
        )


def _load_processing_class(location, has_images, args):
    if not location["pretrained_model_name_or_path"]:
        return None
    try:
        options = {"trust_remote_code": args.trust_remote_code, **location}
        return (AutoProcessor if has_images else AutoTokenizer).from_pretrained(**options)
    except (OSError, ValueError):
        return None


class VocabularyMatch(NamedTuple):
    """Tokens that student and teacher have in common.

    Args:
        num_common_tokens (`int`, *optional*): Number of the student's ids, from 0, that the teacher has as well.
        teacher_token_ids (`list[int]`, *optional*): The teacher's id of each, if the student's vocabulary is trimmed.
        alignment ([`~encdec_slm.trainers.token_alignment.TokenAlignment`], *optional*): For different tokenizers. If
            `num_common_tokens` is `None` as well, nothing is compared.
    """

    num_common_tokens: int | None = None
    teacher_token_ids: list[int] | None = None
    alignment: TokenAlignment | None = None


def compare_vocabularies(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processing_class: Tokenizer,
    teacher_processing_class: Tokenizer,
    args: Seq2SeqDistillationConfig,
) -> VocabularyMatch:
    """Find out which tokens of both models are compared.

    Raises:
        ValueError: The vocabularies differ, and `args` do not allow that.
    """
    processing_classes = (processing_class, teacher_processing_class)
    sizes = (model.config.get_text_config().vocab_size for model in (student, teacher))
    vocabularies = (*map(get_tokenizer, processing_classes), *sizes, find_image_tokens(processing_classes))
    try:
        teacher_token_ids = find_teacher_token_ids(*vocabularies)
        if teacher_token_ids is not None:
            return VocabularyMatch(len(teacher_token_ids), teacher_token_ids)
        return VocabularyMatch(count_common_tokens(*vocabularies))
    except ValueError:
        if args.token_alignment == "byte_spans":
            return VocabularyMatch(alignment=TokenAlignment(*vocabularies[:4]))
        if args.kd_ratio > 0:
            raise
        logger.warning("Student and teacher have different tokenizers: evaluation does not compare them.")
        return VocabularyMatch()


def find_image_tokens(processing_classes: Sequence[Tokenizer]) -> list[str]:
    """Return the tokens that stand for images."""
    return [each.image_token for each in processing_classes if isinstance(each, ProcessorMixin)]


# Generation


class GenerationConfigs(NamedTuple):
    """Generation configs of both models: for sampling targets, and greedy ones for evaluation."""

    student: GenerationConfig
    greedy_student: GenerationConfig
    teacher: GenerationConfig
    greedy_teacher: GenerationConfig


def build_generation_configs(
    base: GenerationConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    processing_class: Tokenizer,
    teacher_processing_class: Tokenizer,
    num_common_tokens: int | None,
    generation_kwargs: dict[str, Any],
) -> GenerationConfigs:
    """Build the generation configs of a run.

    Args:
        base ([`~transformers.GenerationConfig`]): Sampling settings and the end-of-text tokens of the student.
        student ([`~transformers.PreTrainedModel`]): The student.
        teacher ([`~transformers.PreTrainedModel`], *optional*): The teacher; without one, its configs are `None`.
        processing_class: Tokenizer or processor of the student.
        teacher_processing_class: Tokenizer or processor of the teacher.
        num_common_tokens (`int`, *optional*): Ids that both models score; `None` if the models have different ids.
        generation_kwargs (`dict`): Settings of the user, which take precedence; token ids are the student's.

    Raises:
        ValueError: The student has no decoder start token.
    """
    tokenizers = [get_tokenizer(each) for each in (processing_class, teacher_processing_class)]
    image_tokens = find_image_tokens((processing_class, teacher_processing_class))

    def ids_to_suppress(model, tokenizer, settings):
        """Ids that are not text: rows that pad the embedding table, and image tokens."""
        vocabulary = tokenizer.get_vocab()
        num_tokens = num_common_tokens or max(vocabulary.values()) + 1
        padding = range(num_tokens, model.config.get_text_config().vocab_size)
        image_ids = [vocabulary[token] for token in image_tokens if token in vocabulary]
        return sorted({*padding, *image_ids, *(settings.get("suppress_tokens") or ())}) or None

    config = copy.deepcopy(base)
    defaults = {
        "decoder_start_token_id": find_decoder_start_token_id(student),
        "pad_token_id": tokenizers[0].pad_token_id,
        "bos_token_id": tokenizers[0].bos_token_id,
    }
    config.update(**{**defaults, **generation_kwargs})
    config.update(suppress_tokens=ids_to_suppress(student, tokenizers[0], generation_kwargs))
    config.update(eos_token_id=as_id_list(config.eos_token_id))
    if teacher is None:
        return GenerationConfigs(config, _without_sampling(config), None, None)
    teacher_config = copy.deepcopy(config)
    is_common = num_common_tokens is not None
    eos_token_ids = {tokenizers[1].eos_token_id, *as_id_list(teacher.generation_config.eos_token_id)} - {None}
    teacher_config.update(
        decoder_start_token_id=None,
        pad_token_id=config.pad_token_id if is_common else tokenizers[1].pad_token_id or 0,
        bos_token_id=tokenizers[1].bos_token_id,
        eos_token_id=sorted(eos_token_ids),
        suppress_tokens=ids_to_suppress(teacher, tokenizers[1], generation_kwargs if is_common else {}),
    )
    return GenerationConfigs(config, _without_sampling(config), teacher_config, _without_sampling(teacher_config))


def _without_sampling(config):
    config = copy.deepcopy(config)
    config.update(do_sample=False, **dict.fromkeys(name for name in SAMPLING_SETTINGS if hasattr(config, name)))
    return config


def as_id_list(ids: int | Sequence[int] | None) -> list[int]:
    """Return token ids as a list."""
    return [ids] if isinstance(ids, int) else list(ids or ())


def find_decoder_start_token_id(student: PreTrainedModel) -> int:
    """Return the token that the student's decoder starts with.

    Raises:
        ValueError: Neither its config nor its generation config has one.
    """
    configs = (student.config, getattr(student.config, "text_config", None), student.generation_config)
    for config in configs:
        for name in ("decoder_start_token_id", "bos_token_id"):
            if (token_id := getattr(config, name, None)) is not None:
                return token_id
    raise ValueError("The student's config has no `decoder_start_token_id`. Set it to the decoder's first token.")
