# SPDX-License-Identifier: Apache-2.0
"""Print the table of sizes: `python -m encdec_slm.configuration`."""

from .sizes import preset_table


if __name__ == "__main__":
    print(preset_table())
