# SPDX-License-Identifier: Apache-2.0
"""Near copies among many pieces of code: found by MinHash, confirmed by what they really share."""

import re
import zlib

import numpy as np


NUM_BANDS, ROWS_PER_BAND = 16, 4
SHINGLE_TOKENS = 3
TOKEN = re.compile(r"[A-Za-z_]\w*|\d+|[^\s\w]")
COMMENT = re.compile(r"#.*$", re.MULTILINE)


class NearDuplicates:
    """A set of code that answers whether a new piece is nearly one of its own.

    Two pieces are near duplicates if their sets of three tokens in a row, less comments and case, have at least
    `threshold` of their union in common (Jaccard similarity). Order of insertion and code decide every answer, in any
    process.

    Args:
        threshold (`float`, *optional*, defaults to 0.75): In (0, 1]. Below 0.6 the candidates that MinHash offers
            miss some pairs.
    """

    def __init__(self, threshold: float = 0.75):
        self.threshold = threshold
        generator = np.random.default_rng(0)
        num_hashes = NUM_BANDS * ROWS_PER_BAND
        self._factors = generator.integers(1, 2**63, size=(num_hashes, 1), dtype=np.uint64) | np.uint64(1)
        self._offsets = generator.integers(0, 2**63, size=(num_hashes, 1), dtype=np.uint64)
        self._shingles: list[np.ndarray] = []
        self._buckets: dict[tuple[int, bytes], list[int]] = {}

    def add_if_new(self, code: str) -> bool:
        """Whether no near duplicate of `code` was there; then it is now."""
        shingles = _shingles(code)
        keys = self._bucket_keys(shingles)
        candidates = {index for key in keys for index in self._buckets.get(key, ())}
        if any(_jaccard(shingles, self._shingles[index]) >= self.threshold for index in sorted(candidates)):
            return False
        for key in keys:
            self._buckets.setdefault(key, []).append(len(self._shingles))
        self._shingles.append(shingles)
        return True

    def _bucket_keys(self, shingles):
        hashed = self._factors * shingles.astype(np.uint64) + self._offsets  # modulo 2**64, (hashes, shingles)
        signature = (hashed >> np.uint64(32)).min(axis=1).astype(np.uint32).reshape(NUM_BANDS, ROWS_PER_BAND)
        return [(band, values.tobytes()) for band, values in enumerate(signature)]


def _shingles(code):
    """Sorted hashes of all runs of tokens; those of a text shorter than one run are the hash of all of it."""
    tokens = TOKEN.findall(COMMENT.sub("", code).lower())
    runs = [tokens[start : start + SHINGLE_TOKENS] for start in range(max(1, len(tokens) - SHINGLE_TOKENS + 1))]
    return np.unique(np.array([zlib.crc32(" ".join(run).encode()) for run in runs], dtype=np.uint32))


def _jaccard(first, second):
    num_shared = len(np.intersect1d(first, second, assume_unique=True))
    return num_shared / (len(first) + len(second) - num_shared)


__all__ = ["NearDuplicates"]
