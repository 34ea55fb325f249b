# SPDX-License-Identifier: Apache-2.0
"""FSDP2 on CPUs, where it works, although accelerate turns it on for accelerators only.

torchrun --nproc_per_node 2 sharded_on_cpu.py pretrain --config ... is `encdec-slm` with sharded weights.
"""

import sys

from accelerate import state
from encdec_slm_cli import main


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def shard_on_cpu():
    initialize = state.AcceleratorState.__init__

    def initialize_sharded(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        self.distributed_type = state.DistributedType.FSDP
        if "fsdp_plugin" in kwargs:
            self.fsdp_plugin = kwargs["fsdp_plugin"]

    state.AcceleratorState.__init__ = initialize_sharded


if __name__ == "__main__":
    shard_on_cpu()
    sys.exit(main())
