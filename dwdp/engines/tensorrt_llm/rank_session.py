"""A process for one rank's worker, in the form of TensorRT-LLM's ``MpiSession``.

The worker gets an environment of its own before its first line runs: a GPU and a rank. A process that MPI
spawns would get that too late, and its death would end all the others.

As with MPI's workers, the main program is imported again in the new process, so a script has to keep what
it does under ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import Pipe, spawn
from multiprocessing.connection import Connection, wait
from typing import Any

_GRACE_S = 60.0

_is_starting = False


class RankProcessError(RuntimeError):
    """A rank's process ended before its task; the text says how."""


class RankSession:
    """Runs one task in a process of its own.

    Args:
        environ: the process's whole environment.
    """

    n_workers = 1

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = dict(environ)
        self._process: subprocess.Popen[bytes] | None = None
        self._future: Future[Any] = Future()

    @property
    def future(self) -> Future[Any]:
        """The task's result. Of a process that died: a :class:`RankProcessError`."""
        return self._future

    def submit(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Future[Any]]:
        """Start the process with ``task(*args, **kwargs)``, and what that returns later.

        Raises:
            RuntimeError: there was a task before.
        """
        if self._process is not None:
            raise RuntimeError("a rank's process takes one task")
        payload = pickle.dumps((task, args, kwargs))
        ours, theirs = Pipe()
        with theirs:
            start = f"from {__name__} import main; main({theirs.fileno()})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {start}"],
                env=self._environ,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the program that owns the ranks.
            )
        watcher = threading.Thread(
            target=self._watch, args=(ours, payload), name="dwdp-rank", daemon=True
        )
        watcher.start()
        return [self._future]

    def submit_sync(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``submit``, and wait for the result."""
        return [future.result() for future in self.submit(task, *args, **kwargs)]

    def shutdown(self, wait: bool = True) -> None:
        """Wait until the process has ended; it is killed when that takes too long after its task."""
        if self._process is None or not wait:
            return
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self.abort()

    def shutdown_abort(self, grace: float = _GRACE_S, reason: object = None) -> None:
        """Kill the process if it has not ended within ``grace`` seconds."""
        if self._process is not None:
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                self.abort()

    def abort(self) -> None:
        """Kill the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def is_comm_session(self) -> bool:
        """Not one of MPI's."""
        return False

    def _watch(self, connection: Connection, payload: bytes) -> None:
        process = self._process
        assert process is not None
        ended = _end_of(process)
        try:
            connection.send_bytes(pickle.dumps(_preparation()))
            connection.send_bytes(payload)
            if connection in wait([connection, ended]):
                succeeded, value = pickle.loads(connection.recv_bytes())
                if succeeded:
                    self._future.set_result(value)
                else:
                    self._future.set_exception(value)
                process.wait()
                return
        except (OSError, EOFError):
            pass
        finally:
            os.close(ended)
            connection.close()
        self._future.set_exception(RankProcessError(_how_it_ended(process)))


def _end_of(process: subprocess.Popen[bytes]) -> int:
    """A descriptor that can be read once ``process`` has ended."""
    # There is no such call before Linux 5.3, and some containers deny it.
    with suppress(AttributeError, OSError):
        return os.pidfd_open(process.pid)
    reader, writer = os.pipe()

    def wait_and_close() -> None:
        process.wait()
        os.close(writer)

    threading.Thread(target=wait_and_close, name="dwdp-rank-end", daemon=True).start()
    return reader


def main(descriptor: int) -> None:
    """The new process: runs the task that comes through ``descriptor``."""
    from dwdp.engines.tensorrt_llm import import_hook, launch

    launch.end_with_server()
    import_hook.install()
    with Connection(descriptor) as connection:
        preparation, payload = connection.recv_bytes(), connection.recv_bytes()
        try:
            _import_main_program(pickle.loads(preparation))
            task, args, kwargs = pickle.loads(payload)
            answer = pickle.dumps((True, task(*args, **kwargs)))
        except BaseException as error:
            answer = _pickled_error(error)
        connection.send_bytes(answer)


def check_not_starting() -> None:
    """To be called by whoever starts ranks.

    Raises:
        RuntimeError: this is a rank, and its main program is being imported.
    """
    if _is_starting:
        raise RuntimeError(
            "a rank's process imports the main program, which makes an LLM again: keep what it does under "
            "if __name__ == '__main__':"
        )


def _import_main_program(preparation: dict[str, Any]) -> None:
    global _is_starting
    _is_starting = True
    try:
        spawn.prepare(preparation)
    finally:
        _is_starting = False


def _preparation() -> dict[str, Any]:
    """What a new process needs to find the main program's classes."""
    data = spawn.get_preparation_data("dwdp-rank")
    data["authkey"] = bytes(data["authkey"])
    return data


def _pickled_error(error: BaseException) -> bytes:
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:
        return pickle.dumps((False, RankProcessError(f"{type(error).__name__}: {error}")))
    return answer


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    if code >= 0:
        return f"process {process.pid} ended with code {code}"
    return f"process {process.pid} was ended by {signal.Signals(-code).name}"
