"""Ranks as processes that share a GPU, kept alive from job to job: starting one takes seconds."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dwdp.group import Group
from dwdp.rendezvous import serve_store

RESULT_S = 55.0


class RankProcess:
    """What a job sees of the process it runs in.

    Attributes:
        rank: of this process in the pool.
        kept: what one job leaves for the next.
    """

    def __init__(self, rank: int, port: int, pipe: Connection) -> None:
        self.rank = rank
        self.kept: dict[str, Any] = {}
        self._store = dist.TCPStore("127.0.0.1", port, is_master=False)
        self._pipe = pipe

    def group(self, name: str, size: int) -> Group:
        """The group called ``name``; every rank below ``size`` takes part."""
        return Group(self.rank, size, dist.PrefixStore(name, self._store), timeout_s=60)

    def say(self, text: str) -> None:
        """Tell the test something while a job runs."""
        self._pipe.send(("said", text))

    def is_told_to_stop(self) -> bool:
        """Whether the test has called ``stop``."""
        if not self._pipe.poll():
            return False
        self._pipe.recv()
        return True

    def serve(self) -> None:
        """Run jobs until the pool is closed."""
        while True:
            try:
                job, arguments = self._pipe.recv()
            except EOFError:
                return
            try:
                answer = ("done", job(self, *arguments))
            except BaseException:
                answer = ("failed", traceback.format_exc())
            gc.collect()
            torch.cuda.empty_cache()
            self._pipe.send(answer)


def _main(rank: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.cuda.set_device(rank % torch.cuda.device_count())
    RankProcess(rank, port, pipe).serve()


class RankPool:
    """``size`` rank processes. A job is a function of a module, called with a RankProcess first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._store = serve_store("127.0.0.1", 0, size)
        self._num_jobs = 0
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_main, args=(rank, self._store.port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def submit(self, rank: int, job: Callable[..., Any], *arguments: Any) -> None:
        """Start a job on one rank."""
        self._pipes[rank].send((job, arguments))

    def heard(self, rank: int) -> str:
        """What a running job says next."""
        kind, text = self._receive(rank)
        assert kind == "said", f"rank {rank}: {text}"
        return str(text)

    def stop(self, rank: int) -> None:
        """Ask a job that runs until it is told to stop."""
        self._pipes[rank].send("stop")

    def result(self, rank: int) -> Any:
        """What a rank's job returned.

        Raises:
            AssertionError: it failed, died or did not end; the text has the rank's traceback.
        """
        kind, value = self._receive(rank)
        assert kind == "done", f"rank {rank}:\n{value}"
        return value

    def run(self, job: Callable[..., Any], *arguments: Any, size: int | None = None) -> list[Any]:
        """Run ``job(process, group_name, size, *arguments)`` on the first ``size`` ranks at once."""
        self._num_jobs += 1
        size = self.size if size is None else size
        for rank in range(size):
            self.submit(rank, job, f"job{self._num_jobs}", size, *arguments)
        answers = [self._receive(rank) for rank in range(size)]
        failures = [f"rank {rank}:\n{a[1]}" for rank, a in enumerate(answers) if a[0] != "done"]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        self._processes[rank].kill()
        self._processes[rank].join()

    def close(self) -> None:
        """End all ranks."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join()

    def _receive(self, rank: int) -> tuple[str, Any]:
        try:
            if not self._pipes[rank].poll(RESULT_S):
                return "failed", f"no answer within {RESULT_S:.0f} s"
            kind, value = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(5)
            return "failed", f"died with exit code {self._processes[rank].exitcode}"
        return kind, value
