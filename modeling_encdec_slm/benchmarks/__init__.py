# SPDX-License-Identifier: Apache-2.0
"""How fast models of this family are, beside others, on the machine at hand."""
