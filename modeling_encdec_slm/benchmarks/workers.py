# SPDX-License-Identifier: Apache-2.0
"""Contenders in processes of their own: each has its peak of memory and its threads to itself, and all take turns."""

import logging
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import transformers

from .machine import peak_bytes


class Worker:
    """A process that holds one contender and times it when told to.

    Args:
        name (`str`): For messages.
        load (`Callable[[], Callable]`): Called in the process; gives the function that times the contender.
        device (`str`): Whose memory counts, `"cpu"` or `"cuda"`.
        import_engine (`Callable[[], None]`, *optional*): Called before: what it loads is not the model's memory.

    Raises:
        RuntimeError: It cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Callable[..., list[float]]],
        device: str,
        import_engine: Callable[[], None] | None = None,
    ):
        self.name = name
        self._connection, other = get_context("spawn").Pipe()
        arguments = (other, load, device, import_engine)
        self._process = get_context("spawn").Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        self.bytes_before = self._answer()

    def token_seconds(self, *task: Any) -> list[float]:
        """Seconds from the call until each of the new tokens is known; `task` is what the function of `load` takes."""
        self._connection.send(task)
        return self._answer()

    def peak_bytes(self) -> int:
        """Most memory that the process has held so far, in bytes."""
        self._connection.send(None)
        return self._answer()

    def close(self):
        """Ends the process."""
        self._connection.close()
        self._process.join(timeout=30)
        self._process.kill()
        self._process.join()

    def _answer(self):
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError(
                f"{self.name} ended without an answer: most likely the machine ran out of memory. Take a smaller "
                "preset, or fewer contenders."
            ) from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"{self.name} failed: {answer}") from answer
        return answer


def _serve(connection, load, device, import_engine):
    # Shapes may write beyond the length that they are meant for, and torchao lacks kernels: no time changes by either.
    transformers.logging.set_verbosity_error()
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if import_engine is not None:
            import_engine()
        before = peak_bytes(device)
        token_seconds = load()
        connection.send(before)
        while True:
            task = connection.recv()
            connection.send(peak_bytes(device) if task is None else token_seconds(*task))
    except EOFError:
        pass
    except Exception as error:
        # The trace would not survive the way to the other process.
        connection.send(RuntimeError(f"{error}\n{traceback.format_exc()}"))
