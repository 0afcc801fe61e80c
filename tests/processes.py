"""Scripts in processes of their own: what is to be killed, or to run beside another."""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERB = """
import sys
from bridgeblip.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


class Script:
    """A script in a process of its own, as ``python -c`` runs it from the repository, that begins
    with the libraries loaded: most of what a start of Python costs."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "bridgeblip.bridge.train", "bridgeblip.bridge.export", "bridgeblip.bundle.predict",
        "bridgeblip.vlm.tune", "torch.utils.tensorboard", "matplotlib.backends.backend_svg",
    ])  # fmt: skip

    def __init__(self, code: str, *arguments, env: dict[str, str] | None = None):
        self.printed = b""
        reader, writer = self.context.Pipe(duplex=False)
        how = (code, [str(argument) for argument in arguments], env or {}, writer)
        self.process = self.context.Process(target=_run_script, args=how)
        self.process.start()
        writer.close()
        self.pid = self.process.pid
        self.listener = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        self.listener.start()

    def _listen(self, reader) -> None:
        while chunk := os.read(reader.fileno(), 1 << 16):
            self.printed += chunk

    def is_running(self) -> bool:
        return self.process.is_alive()

    def wait_for(self, condition, timeout: float = 90) -> None:
        """Wait until ``condition()`` is true; the script must not end before."""
        until = time.monotonic() + timeout
        while not condition():
            assert self.is_running() and time.monotonic() < until, self.output()
            time.sleep(0.02)

    def send(self, number: signal.Signals, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def output(self) -> str:
        """What it has printed so far."""
        return self.printed.decode(errors="replace")

    def end(self, timeout: float = 300) -> tuple[int, str]:
        """Wait for its end; return its exit code, below zero for a signal, and what it printed."""
        self.process.join(timeout)
        if self.is_running():
            self.process.kill()
            raise AssertionError(f"runs for more than {timeout} seconds: {self.output()}")
        self.listener.join(10)
        return self.process.exitcode, self.output()


def launch(code: str, *arguments, env: dict[str, str] | None = None) -> list[Script]:
    """Start two processes of one run, as ``torchrun`` and ``accelerate launch`` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank} | together | (env or {})
        processes.append(Script(code, *arguments, env=own))
    return processes


def _run_script(code: str, arguments: list[str], env: dict[str, str], writer) -> None:
    gc.freeze()  # what was loaded before
    os.setpgrp()
    usual = multiprocessing.get_all_start_methods()[0]
    multiprocessing.set_start_method(usual, force=True)  # of loaders' processes, as without us
    for stream in (1, 2):
        os.dup2(writer.fileno(), stream)
    writer.close()
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
