# SPDX-License-Identifier: Apache-2.0
"""Contenders in processes of their own: each has its peak of memory and its threads to itself, and all take turns."""

import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

from .contenders import Contender
from .machine import peak_bytes


class Worker:
    """A process that holds one contender and times it when told to.

    Args:
        contender ([`Contender`]): What it holds; loaded at once.
        folder (`Path`): Where [`~encdec_slm.benchmarks.engines.prepare`] wrote it.
        num_threads (`int`): Of the engine.

    Raises:
        RuntimeError: It cannot be loaded.
    """

    def __init__(self, contender: Contender, folder: Path, num_threads: int):
        self.contender = contender
        self._connection, other = get_context("spawn").Pipe()
        arguments = (other, contender, folder, num_threads)
        self._process = get_context("spawn").Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        self.bytes_before = self._answer()

    def token_seconds(self, source_ids: Sequence[int], num_new_tokens: int) -> list[float]:
        """Seconds from the call until each of the new tokens is known."""
        self._connection.send((source_ids, num_new_tokens))
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

    def _answer(self):
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError(
                f"{self.contender.name} ended without an answer: most likely the machine ran out of memory. Take a "
                "smaller preset, or fewer contenders."
            ) from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"{self.contender.name} failed: {answer}") from answer
        return answer


def _serve(connection, contender, folder, num_threads):
    try:
        # An engine's libraries do not count as the model's memory.
        from .engines import import_engine, load

        import_engine(contender, num_threads)
        before = peak_bytes(contender.device)
        token_seconds = load(contender, folder, num_threads)
        connection.send(before)
        while True:
            task = connection.recv()
            connection.send(peak_bytes(contender.device) if task is None else token_seconds(*task))
    except EOFError:
        pass
    except Exception as error:
        # The trace would not survive the way to the other process.
        connection.send(RuntimeError(f"{error}\n{traceback.format_exc()}"))
