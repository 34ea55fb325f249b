# SPDX-License-Identifier: Apache-2.0
"""Student, teacher and their tokenizers for a distillation run: loaded, and checked against each other."""

import copy
import logging

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import is_peft_available

from .distillation_config import Seq2SeqDistillationConfig
from .distillation_images import tokenizer_of
from .vocabulary import num_common_tokens


logger = logging.getLogger(__name__)


def checked_args(args, model, compute_metrics) -> Seq2SeqDistillationConfig:
    """The run's settings, or those of a run without any.

    Raises:
        TypeError: `args` is of another class.
        ValueError: Generated texts are to be scored, but not to be generated.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path or model.config.model_type
        args = Seq2SeqDistillationConfig(f"{name.rstrip('/').split('/')[-1]}-Distillation")
    if not isinstance(args, Seq2SeqDistillationConfig):
        raise TypeError(
            f"`args` is a {type(args).__name__}, but a Seq2SeqDistillationConfig is needed. It takes the same "
            "settings: change the name of the class."
        )
    if compute_metrics is not None and not args.predict_with_generate:
        raise ValueError(
            "`compute_metrics` is given and `predict_with_generate` is false, so there would be no texts to score. "
            "Set `predict_with_generate=True`."
        )
    return args


def load_student(model, args, quantization_config=None) -> PreTrainedModel:
    """The student, loaded if it is a string.

    Raises:
        ValueError: The string names no encoder-decoder, or settings for loading come twice.
    """
    if not isinstance(model, str):
        if args.model_init_kwargs is not None or quantization_config is not None:
            raise ValueError(
                "`model_init_kwargs` or `quantization_config` is given, but the student is loaded already. Give the "
                "student as a string, or leave them out."
            )
        return model
    kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if not _config_of(model, kwargs).is_encoder_decoder:
        raise ValueError(_no_student(model))
    return AutoModelForSeq2SeqLM.from_pretrained(model, **_placed(kwargs, args))


def load_teacher(teacher, args) -> PreTrainedModel:
    """The teacher, loaded if it is a string; a string may name a LoRA adapter.

    Raises:
        ValueError: There is no teacher, it is an encoder-decoder, or settings for loading come with a loaded one.
    """
    teacher = args.teacher_model_name_or_path if teacher is None else teacher
    if teacher is None:
        raise ValueError(
            "There is no teacher. Pass `teacher_model`, a causal language model or the name of one, or set "
            "`teacher_model_name_or_path`."
        )
    if not isinstance(teacher, str):
        if args.teacher_model_init_kwargs is not None:
            raise ValueError(
                "`teacher_model_init_kwargs` is given, but the teacher is loaded already. Give the teacher as a "
                "string, or leave them out."
            )
        return teacher
    kwargs = {"dtype": "auto", "trust_remote_code": args.trust_remote_code}
    if args.teacher_model_revision is not None:
        kwargs["revision"] = args.teacher_model_revision
    kwargs |= args.teacher_model_init_kwargs or {}
    config = _config_of(teacher, kwargs)
    if config.is_encoder_decoder:
        raise ValueError(_no_teacher(teacher))
    is_other = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    auto_class = AutoModelForImageTextToText if is_other else AutoModelForCausalLM
    model, info = auto_class.from_pretrained(teacher, output_loading_info=True, **_placed(kwargs, args))
    if info["missing_keys"]:  # a backbone without its head, say, which would get a random one
        raise ValueError(_no_teacher(teacher))
    return model


def _config_of(name, kwargs):
    """The config of a model, or of the one beneath an adapter."""
    options = {key: kwargs[key] for key in ("revision", "trust_remote_code", "token", "cache_dir") if key in kwargs}
    if is_peft_available():
        from transformers.utils.peft_utils import find_adapter_config_file

        if find_adapter_config_file(name, revision=options.get("revision")) is not None:
            from peft import PeftConfig

            name = PeftConfig.from_pretrained(name).base_model_name_or_path
            options.pop("revision", None)
    return AutoConfig.from_pretrained(name, **options)


def _placed(kwargs, args):
    """Each process of a distributed run has a whole model; elsewhere a `device_map` is taken as it is given."""
    is_distributed = args.distributed_state.num_processes > 1 if args.distributed_state is not None else False
    return {**kwargs, "device_map": None} if is_distributed else kwargs


def check_roles(student, teacher) -> None:
    """Raises a `ValueError` unless the student is an encoder-decoder and the teacher a causal language model."""
    if not getattr(student.config, "is_encoder_decoder", False) or not _writes(student):
        raise ValueError(_no_student(type(student).__name__))
    # Encoders such as BERT, which read what they are to predict, say that they are no decoders.
    is_other = getattr(teacher.config, "is_encoder_decoder", False) or not getattr(teacher.config, "is_decoder", True)
    if is_other or not _writes(teacher):
        raise ValueError(_no_teacher(type(teacher).__name__))


def _writes(model):
    """Whether a model has an output head and generates."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).can_generate()


def _no_student(name):
    return (
        f"The student {name} is no encoder-decoder with an output head, but its encoder is to read the source and "
        "its decoder to write. "
        "Use one that `AutoModelForSeq2SeqLM` loads; for a decoder-only student use TRL's DistillationTrainer."
    )


def _no_teacher(name):
    return (
        f"The teacher {name} is no causal language model, but it is to read source and target in one row and to "
        "predict the target. Use a decoder-only model that `AutoModelForCausalLM` loads."
    )


def load_processing_classes(
    processing_class, teacher_processing_class, student, teacher, args
) -> tuple[PreTrainedTokenizerBase | ProcessorMixin, PreTrainedTokenizerBase | ProcessorMixin]:
    """Tokenizers of student and teacher, or processors of those that read images; from beside the models if not given.

    Raises:
        TypeError: One is of another kind.
        ValueError: The student's cannot be found, has no end-of-text token, or means another token by images.
    """
    has_images = _reads_images(student)
    kind = ProcessorMixin if has_images else PreTrainedTokenizerBase
    if processing_class is None:
        processing_class = _saved_processing_class(student, args, has_images)
        if processing_class is None:
            raise ValueError(
                f"No tokenizer lies beside the student {student.config._name_or_path!r}. Pass one as "
                "`processing_class`."
            )
    if teacher_processing_class is None:
        teacher_processing_class = _saved_processing_class(teacher, args, has_images and _reads_images(teacher))
    if teacher_processing_class is None:
        logger.warning("No tokenizer lies beside the teacher: it is taken to have the student's.")
        teacher_processing_class = tokenizer_of(processing_class)
    _check_kind("processing_class", processing_class, student, [kind])
    # A teacher that could read images may be given text about them alone.
    kinds = [PreTrainedTokenizerBase, *([ProcessorMixin] if has_images and _reads_images(teacher) else [])]
    _check_kind("teacher_processing_class", teacher_processing_class, teacher, kinds)
    tokenizer, teacher_tokenizer = tokenizer_of(processing_class), tokenizer_of(teacher_processing_class)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The student's tokenizer has no end-of-text token, so the student could not be taught to stop. Set its "
            "`eos_token`."
        )
    if teacher_tokenizer.eos_token != tokenizer.eos_token:
        logger.warning(
            f"The student ends its texts with {tokenizer.eos_token!r} and the teacher with "
            f"{teacher_tokenizer.eos_token!r}: at the end of a text the teacher predicts another token than the "
            "student is taught. If both know the teacher's, make it the `eos_token` of the student's tokenizer."
        )
    if tokenizer.pad_token is None:
        processing_class = copy.deepcopy(processing_class)
        tokenizer_of(processing_class).pad_token = tokenizer.eos_token
    return processing_class, teacher_processing_class


def _reads_images(model):
    return getattr(model.config, "image_token_id", None) is not None


def _check_kind(name, value, model, kinds):
    if not isinstance(value, tuple(kinds)):
        needed = "tokenizer" if kinds[0] is PreTrainedTokenizerBase else "processor"
        raise TypeError(f"`{name}` is a {type(value).__name__}, but a {needed} is needed. Pass its {needed}.")
    if isinstance(value, ProcessorMixin) and value.image_token_id != model.config.image_token_id:
        raise ValueError(
            f"`{name}` puts images at the token id {value.image_token_id}, but {type(model).__name__} looks for them "
            f"at `image_token_id` {model.config.image_token_id}. Use the processor that the model was made with."
        )


def _saved_processing_class(model, args, has_images):
    name, auto_class = model.config._name_or_path, AutoProcessor if has_images else AutoTokenizer
    try:
        return auto_class.from_pretrained(name, trust_remote_code=args.trust_remote_code) if name else None
    except (OSError, ValueError):
        return None


def common_tokens(tokenizer, teacher_tokenizer, student, teacher, args, image_tokens=()) -> int | None:
    """How many ids both models score; `None` where they differ and nothing is to be compared (`kd_ratio` 0)."""
    sizes = (model.config.get_text_config().vocab_size for model in (student, teacher))
    try:
        return num_common_tokens(tokenizer, teacher_tokenizer, *sizes, image_tokens)
    except ValueError:
        if args.kd_ratio > 0:
            raise
        logger.warning("Student and teacher have different tokenizers: evaluation does not compare them.")
        return None


def decoder_start_token_id(student) -> int:
    """What the student's decoder begins with.

    Raises:
        ValueError: Neither config says it.
    """
    configs = (student.config, getattr(student.config, "text_config", None), student.generation_config)
    for config in configs:
        for name in ("decoder_start_token_id", "bos_token_id"):
            if (token_id := getattr(config, name, None)) is not None:
                return token_id
    raise ValueError("The student's config has no `decoder_start_token_id`. Set it to what its decoder begins with.")
