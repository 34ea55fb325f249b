# SPDX-License-Identifier: Apache-2.0
"""Near duplicates in code: candidates by MinHash, confirmed by Jaccard similarity."""

import re
import zlib

import numpy as np


NUM_BANDS, ROWS_PER_BAND = 16, 4
SHINGLE_TOKENS = 3
TOKEN = re.compile(r"[A-Za-z_]\w*|\d+|[^\s\w]")
COMMENT = re.compile(r"#.*$", re.MULTILINE)


class NearDuplicates:
    """A set of code without near duplicates.

    Near duplicates have a Jaccard similarity of at least `threshold` between their sets of three consecutive tokens,
    without comments and case.

    Args:
        threshold (`float`, *optional*, defaults to 0.75): In (0, 1]. Below 0.6, MinHash misses some pairs.
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
        """Add code unless the set has a near duplicate; return whether it was added."""
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
    """Return the sorted hashes of all runs of tokens; a shorter text has one hash."""
    tokens = TOKEN.findall(COMMENT.sub("", code).lower())
    runs = [tokens[start : start + SHINGLE_TOKENS] for start in range(max(1, len(tokens) - SHINGLE_TOKENS + 1))]
    return np.unique(np.array([zlib.crc32(" ".join(run).encode()) for run in runs], dtype=np.uint32))


def _jaccard(first, second):
    num_shared = len(np.intersect1d(first, second, assume_unique=True))
    return num_shared / (len(first) + len(second) - num_shared)


__all__ = ["NearDuplicates"]
