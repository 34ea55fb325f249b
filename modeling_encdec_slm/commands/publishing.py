# SPDX-License-Identifier: Apache-2.0
"""`evaluate`, `publish` and `demo`: what a checkpoint is worth, and how others get it."""



from .shared import Config, Debug, examples


def evaluate(config: Config = None, debug: Debug = False):
    """Score."""


def publish(config: Config = None, debug: Debug = False):
    """Publish."""


def demo(config: Config = None, debug: Debug = False):
    """Demo."""


for one in (evaluate, publish, demo):
    one.examples = examples("x")
