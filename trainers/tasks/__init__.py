# SPDX-License-Identifier: Apache-2.0
"""Built-in tasks: rows made on this machine, without downloads."""
