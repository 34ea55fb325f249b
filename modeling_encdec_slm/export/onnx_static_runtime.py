# SPDX-License-Identifier: Apache-2.0
"""Runs graphs of fixed shape: pads sources to a bucket, and moves the cache of each row from step to step.

Axes in shape comments: B batch, S source, T cached target, L decoder layers, K key/value heads, d width of a head,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput


# What runs one graph: arrays by input name in, arrays in the order of its outputs out.
Session = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


@dataclass
class StaticEncoding(BaseModelOutput):
    """What the encoder gives for a batch: states of shape `(B, S, D)`, and what the cross-attentions read.

    `cross_key_values` has shape `(B, 2 * L, K, bucket, d)`: rows first, so that `generate` repeats them for beams.
    """

    cross_key_values: torch.FloatTensor | None = None


class StaticCache:
    """Keys and values of the target: for each row the arrays that the last step gave, which the next one reads."""

    is_compileable = False

    def __init__(self, rows):
        self.rows = rows
        self.num_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.rows = [self.rows[index] for index in beam_idx.tolist()]

    def activate_past_recording(self) -> None:
        """What `generate` calls before it lets a draft be checked; always refused.

        Raises:
            ValueError: A draft saves nothing here.
        """
        raise ValueError(
            "An assistant or `prompt_lookup_num_tokens` was given, but the graphs of a static bundle run one token "
            "per call, so that a draft saves nothing. Leave it out, or export without `static_lengths`."
        )


class StaticEngine:
    """Encodes and decodes with the graphs of a static bundle, row by row, as each has room for one.

    Args:
        folder (`Path`): Where the bundle lies.
        manifest (`dict`): What `read_manifest` gave for it.
        open_session (`Callable[[Path], Session]`): Opens a graph; called once for each file that is needed.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], open_session: Callable[[Path], Session]):
        self.source_lengths, self.target_length = manifest["source_lengths"], manifest["target_length"]
        self._folder, self._open_session = folder, open_session
        self._graphs = {(graph["role"], graph["source_length"]): name for name, graph in manifest["graphs"].items()}
        inputs = manifest["graphs"][self._graphs["decoder", self.source_lengths[0]]]["inputs"]
        self._own_names = [tensor["name"] for tensor in inputs if ".decoder." in tensor["name"]]
        self._cross_names = [tensor["name"] for tensor in inputs if ".encoder." in tensor["name"]]
        self._cache_shape = next(tuple(tensor["shape"]) for tensor in inputs if ".decoder." in tensor["name"])
        self._sessions = {}

    def _session(self, role, source_length):
        name = self._graphs[role, source_length]
        if name not in self._sessions:
            self._sessions[name] = self._open_session(self._folder / name)
        return self._sessions[name]

    def encode(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> StaticEncoding:
        """What the decoder needs to know of sources.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): 1 for tokens that are
                read, 0 for padding. `None` reads all.

        Raises:
            ValueError: The sources are longer than the largest bucket.
            TypeError: Ids are no integers.
        """
        _check_integers(input_ids, "input_ids")
        length = input_ids.shape[1]
        bucket = self._bucket(length)
        masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, masks = _padded(input_ids, bucket, np.int32), _padded(masks, bucket, np.float32)
        session = self._session("encoder", bucket)
        rows = [session({"input_ids": ids[[row]], "attention_mask": masks[[row]]}) for row in range(len(ids))]
        return StaticEncoding(
            last_hidden_state=torch.from_numpy(np.concatenate([states for states, *_ in rows])[:, :length]),
            cross_key_values=torch.from_numpy(np.stack([np.concatenate(cross) for _, *cross in rows])),
        )

    def _bucket(self, length):
        fitting = [bucket for bucket in self.source_lengths if bucket >= length]
        if not fitting:
            raise ValueError(
                f"The source has {length} tokens, but the largest that this bundle was exported for has "
                f"{self.source_lengths[-1]}. Shorten it (`truncation=True, max_length={self.source_lengths[-1]}` of "
                f"the tokenizer), or export with `static_lengths` up to {length}."
            )
        return fitting[0]

    def new_cache(self, batch_size: int, max_length: int | None = None) -> StaticCache:
        """A cache that holds no token.

        Args:
            batch_size (`int`): Rows.
            max_length (`int`, *optional*): Tokens of the longest target that is asked for. `None` does not know.

        Raises:
            ValueError: The cache has no room for so many.
        """
        # The last token is written, but never read.
        self._check_room((max_length or 1) - 1)
        empty = np.zeros(self._cache_shape, np.float32)
        return StaticCache([[empty] * len(self._own_names) for _ in range(batch_size)])

    def decode(
        self,
        decoder_input_ids: torch.LongTensor,
        encoding: StaticEncoding,
        attention_mask: torch.Tensor | None,
        cache: StaticCache,
    ) -> torch.FloatTensor:
        """Logits of shape `(batch_size, target_length, vocab_size)`; `cache` gets the tokens, one step for each.

        Args:
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`): What follows the tokens that
                `cache` holds.
            encoding ([`StaticEncoding`]): Of the sources, row by row.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): That of the sources.
            cache ([`StaticCache`]): Is changed.

        Raises:
            ValueError: There are more tokens than the cache has room for, or the encoding is of another model.
            TypeError: Ids are no integers.
        """
        _check_integers(decoder_input_ids, "decoder_input_ids")
        total = cache.num_tokens + decoder_input_ids.shape[1]
        self._check_room(total)
        if getattr(encoding, "cross_key_values", None) is None:
            raise ValueError(
                "`encoder_outputs` has no `cross_key_values`, which the decoder of a static bundle reads instead of "
                "the encoder's states. Take it from `get_encoder()` of this model."
            )
        bucket = encoding.cross_key_values.shape[3]
        if attention_mask is None:
            attention_mask = torch.ones(encoding.last_hidden_state.shape[:2])
        masks = _padded(attention_mask, bucket, np.float32)
        cross, ids = encoding.cross_key_values.numpy(), decoder_input_ids.numpy().astype(np.int32)
        session = self._session("decoder", bucket)
        logits = np.stack(
            [self._steps(session, cache, *row) for row in enumerate(zip(ids, masks, cross, strict=True))]
        )
        cache.num_tokens = total
        return torch.from_numpy(logits)

    def _check_room(self, num_tokens):
        if num_tokens > self.target_length:
            raise ValueError(
                f"{num_tokens} new tokens were asked for, but the cache of this bundle has room for "
                f"{self.target_length}. Ask for at most `max_new_tokens={self.target_length}`, or export with "
                f'`static_lengths={{"source": {self.source_lengths}, "target": {num_tokens}}}`.'
            )

    def _steps(self, session, cache, row, inputs):
        """Logits `(T, V)` of one row's new tokens, after which the cache of the row holds them."""
        ids, mask, cross = inputs
        fixed = dict(zip(self._cross_names, cross[:, None], strict=True)) | {"encoder_attention_mask": mask[None]}
        all_logits = []
        for position, token_id in enumerate(ids, start=cache.num_tokens):
            own_mask = np.zeros((1, self.target_length), np.float32)
            own_mask[:, self.target_length - 1 - position :] = 1
            logits, *cache.rows[row] = session(
                {
                    "input_ids": token_id.reshape(1, 1),
                    "position_ids": np.full((1, 1), position, np.int32),
                    "decoder_attention_mask": own_mask,
                    **dict(zip(self._own_names, cache.rows[row], strict=True)),
                    **fixed,
                }
            )
            all_logits.append(logits[0, 0])
        return np.stack(all_logits)


def _check_integers(ids, name):
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(
            f"`{name}` has dtype {ids.dtype}, but token ids are integers. Pass what the tokenizer returns."
        )


def _padded(rows, length, dtype):
    padded = np.zeros((rows.shape[0], length), dtype)
    padded[:, : rows.shape[1]] = rows.numpy()
    return padded
