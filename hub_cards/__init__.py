# SPDX-License-Identifier: Apache-2.0
"""Cards of models, and repositories of the Hub."""

from .publishing import PublishedRepository, publish


__all__ = ["PublishedRepository", "publish"]
