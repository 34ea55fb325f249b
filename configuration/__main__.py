# SPDX-License-Identifier: Apache-2.0
"""`python -m encdec_slm.configuration` prints the table of sizes."""

from .sizes import preset_table


if __name__ == "__main__":
    print(preset_table())
