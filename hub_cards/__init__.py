# SPDX-License-Identifier: Apache-2.0
"""Model cards, and publishing to the Hub."""

from .model_cards import write_card
from .publishing import PublishedRepository, publish


__all__ = ["PublishedRepository", "publish", "write_card"]
