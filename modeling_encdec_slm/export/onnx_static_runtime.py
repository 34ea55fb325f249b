# SPDX-License-Identifier: Apache-2.0
"""Run graphs of fixed shape: pad each source to a bucket, and decode one token of one row at a time.

Axes in shape comments: B batch, S source, T target, L decoder layers, K key/value heads, d width of a head,
V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from .onnx_runtime import OpenGraph


@dataclass
class StaticEncoding(BaseModelOutput):
    """Encoded sources: states of shape `(B, S, D)`, and what the cross-attentions read.

    `cross_key_values` has shape `(B, 2 * L, K, bucket, d)`: rows first, so that `generate` repeats them for beams.
    """

    cross_key_values: torch.FloatTensor | None = None


class StaticCache:
    """Keys and values of the target: for each row the tensors that the last step returned."""

    is_compileable = False

    def __init__(self, rows):
        self.rows = rows
        self.num_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.rows = [self.rows[index] for index in beam_idx.tolist()]

    def activate_past_recording(self) -> None:
        """Refuse drafts, for which `generate` calls this.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "An assistant or `prompt_lookup_num_tokens` is given, but graphs of fixed shape read one token per call, "
            "so that a draft saves nothing. Leave it out, or export without `static_lengths`."
        )


class StaticEngine:
    """Encodes and decodes with graphs of fixed shape, row by row.

    Args:
        folder (`Path`): Folder of the export.
        manifest (`dict`): Its manifest.
        open_graph (`OpenGraph`): Opens a graph in a runtime; called once for each file, when it is needed.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], open_graph: OpenGraph):
        self.source_lengths, self.target_length = manifest["source_lengths"], manifest["target_length"]
        self._folder, self._open_graph = folder, open_graph
        self._names = {(graph["role"], graph["source_length"]): name for name, graph in manifest["graphs"].items()}
        self._shapes = {
            name: {
                kind: {each["name"]: tuple(each["shape"]) for each in graph[kind]} for kind in ("inputs", "outputs")
            }
            for name, graph in manifest["graphs"].items()
        }
        inputs = self._shapes[self._names["decoder", self.source_lengths[0]]]["inputs"]
        self._past_shapes = {name: shape for name, shape in inputs.items() if ".decoder." in name}
        self._cross_names = [name for name in inputs if ".encoder." in name]
        self._graphs = {}

    def _run(self, role, bucket, inputs):
        """Run a graph; return its outputs in order."""
        name = self._names[role, bucket]
        if name not in self._graphs:
            self._graphs[name] = self._open_graph(self._folder / name, None)
        return list(self._graphs[name](inputs, self._shapes[name]["outputs"]).values())

    def encode(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> StaticEncoding:
        """Encode sources.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, source_length)`): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): 1 for tokens, 0 for
                padding. `None` reads all.

        Raises:
            ValueError: The sources are longer than the largest bucket.
        """
        length = input_ids.shape[1]
        bucket = self._find_bucket(length)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": _pad(input_ids.int(), bucket), "attention_mask": _pad(mask.float(), bucket)}
        rows = [
            self._run("encoder", bucket, {name: tensor[[row]] for name, tensor in inputs.items()})
            for row in range(len(input_ids))
        ]
        return StaticEncoding(
            last_hidden_state=torch.cat([states for states, *_ in rows])[:, :length],
            cross_key_values=torch.stack([torch.cat(cross) for _, *cross in rows]),
        )

    def _find_bucket(self, length):
        if length > self.source_lengths[-1]:
            raise ValueError(
                f"The source has {length} tokens, but this export allows {self.source_lengths[-1]}. Shorten it "
                f"(`truncation=True, max_length={self.source_lengths[-1]}` of the tokenizer), or export with "
                f"`static_lengths` up to {length}."
            )
        return next(bucket for bucket in self.source_lengths if bucket >= length)

    def new_cache(self, batch_size: int, max_length: int | None = None) -> StaticCache:
        """Return an empty cache.

        Args:
            batch_size (`int`): Number of rows.
            max_length (`int`, *optional*): Length of the longest target, start token included. `None` if unknown.

        Raises:
            ValueError: The cache is smaller.
        """
        # The last token is generated, but not read.
        self._check_room((max_length or 1) - 1)
        empty = [torch.zeros(shape) for shape in self._past_shapes.values()]
        return StaticCache([empty] * batch_size)

    def decode(
        self,
        decoder_input_ids: torch.LongTensor,
        encoding: StaticEncoding,
        attention_mask: torch.Tensor | None,
        cache: StaticCache,
    ) -> torch.FloatTensor:
        """Return logits of shape `(batch_size, target_length, vocab_size)`, and add the tokens to `cache`.

        Args:
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`): The tokens after those in
                `cache`.
            encoding ([`StaticEncoding`]): Encoded sources, one per row.
            attention_mask (`torch.Tensor` of shape `(batch_size, source_length)`, *optional*): Mask of the sources.
            cache ([`StaticCache`]): Extended in place.

        Raises:
            ValueError: The cache has no room for the tokens, or the encoding is from another model.
        """
        total = cache.num_tokens + decoder_input_ids.shape[1]
        self._check_room(total)
        if getattr(encoding, "cross_key_values", None) is None:
            raise ValueError(
                "`encoder_outputs` has no `cross_key_values`, which graphs of fixed shape read instead of the "
                "encoder's states. Take it from `get_encoder()` of this model."
            )
        bucket = encoding.cross_key_values.shape[3]
        mask = torch.ones(encoding.last_hidden_state.shape[:2]) if attention_mask is None else attention_mask.float()
        rows = zip(decoder_input_ids.int(), _pad(mask, bucket), encoding.cross_key_values, strict=True)
        logits = torch.stack([self._decode_row(cache, row, bucket, *inputs) for row, inputs in enumerate(rows)])
        cache.num_tokens = total
        return logits

    def _check_room(self, num_tokens):
        if num_tokens > self.target_length:
            raise ValueError(
                f"{num_tokens} new tokens are requested, but this export allows {self.target_length}. Use at most "
                f"`max_new_tokens={self.target_length}`, or export with "
                f'`static_lengths={{"source": {self.source_lengths}, "target": {num_tokens}}}`.'
            )

    def _decode_row(self, cache, row, bucket, ids, mask, cross):
        """Return logits `(T, V)` of one row's new tokens, and add them to its cache."""
        fixed = dict(zip(self._cross_names, cross[:, None], strict=True)) | {"encoder_attention_mask": mask[None]}
        all_logits = []
        for position, token_id in enumerate(ids, start=cache.num_tokens):
            # The newest token is the last one in the cache.
            self_mask = (torch.arange(self.target_length) >= self.target_length - 1 - position).float()[None]
            inputs = {"input_ids": token_id.view(1, 1), "position_ids": torch.full_like(token_id.view(1, 1), position)}
            past = dict(zip(self._past_shapes, cache.rows[row], strict=True))
            outputs = self._run("decoder", bucket, {**inputs, "decoder_attention_mask": self_mask, **past, **fixed})
            logits, *cache.rows[row] = outputs
            all_logits.append(logits[0, 0])
        return torch.stack(all_logits)


def _pad(rows, length):
    return F.pad(rows, (0, length - rows.shape[1]))
