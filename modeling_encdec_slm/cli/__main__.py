# SPDX-License-Identifier: Apache-2.0
"""`python -m encdec_slm_cli` is `encdec-slm`, for launchers such as `accelerate launch -m`."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
