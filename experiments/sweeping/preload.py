"""Starts the stages of trials from a process that has imported torch, MLflow and the rest already.

A stage spends seconds on imports, the same in each trial. A worker starts this module once. It imports them, and then
forks for each stage. `dvc repro` runs `python -m stages.train` as always, but `python` is a small program in
`bin/` that passes its arguments, environment and standard streams to this process over a Unix socket, and returns the
exit code of the fork. It is the only thing on the path that differs. Without this process, it starts the real Python.

Signals that the small program receives go to the fork. If it is killed, the fork gets a SIGTERM.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from stages.cores import limit_busy_waiting
from stages.process import request_sigterm_with_parent

MODULES = (
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "mlflow",
    "mlflow.entities",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.system_metrics.system_metrics_monitor",
    "mlflow.tracking",
    "numpy",
    "pandas",
    "psutil",
    "pyarrow",
    "safetensors.torch",
    "tiktoken",
    "torch",
    "torch._dynamo",
    "tqdm",
    "gpt2.evaluation.breakdown",
    "gpt2.inference.engine",
    "stages.evaluation_report",
    "stages.results",
    "stages.session",
)
HEADER_BYTES = 1 << 20
STREAMS = 3
CLIENT = '''#!{python} -SI
"""`python -m stages.NAME` in a fork of a process that has imported everything (experiments/sweeping/preload.py)."""
import array, json, os, signal, socket, sys
try:
    if sys.argv[1:2] != ["-m"] or not sys.argv[2:3] or not sys.argv[2].startswith("stages."):
        raise OSError
    server = socket.socket(socket.AF_UNIX)
    server.connect({socket!r})
except OSError:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
def forward(number, _):
    try:
        server.send(bytes([number]))
    except OSError:
        pass
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, forward)
header = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg([len(header).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(header)
code = server.recv(1)
sys.exit(code[0] if code else 143)
'''


def write_client(folder: Path, socket_path: Path) -> Path:
    """Writes the program `python` that asks the process at a socket. Returns the folder to put on the path."""
    folder.mkdir(parents=True, exist_ok=True)
    client = folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, socket=str(socket_path)), encoding="utf-8")
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    return folder


class _Child:
    """A fork, and the connection of the program that stands for it."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self.connection = pid, connection
        self.ended = os.pidfd_open(pid)


class Server:
    """Forks for each request. `serve` returns in the forks only, with what they run."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        self.listener.bind(str(path))
        self.listener.listen()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.children: dict[int, _Child] = {}
        self.is_stopping = False

    def serve(self) -> list[str] | None:
        """Serves until a SIGTERM, then until the last fork has ended. Returns the arguments of a fork, or None."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while not (self.is_stopping and not self.children):
            for key, _ in self.selector.select(0.5):
                if key.data is None:
                    arguments = self._accept()
                    if arguments is not None:
                        return arguments
                elif key.fileobj == key.data.ended:
                    self._end(key.data)
                elif key.data.pid in self.children:
                    self._pass_on(key.data)
        return None

    def _stop(self, *_: object) -> None:
        self.is_stopping = True

    def _accept(self) -> list[str] | None:
        connection, _ = self.listener.accept()
        try:
            request, streams = _receive(connection)
        except (OSError, ValueError):
            connection.close()
            return None
        pid = os.fork()
        if pid:
            for descriptor in streams:
                os.close(descriptor)
            child = self.children[pid] = _Child(pid, connection)
            self.selector.register(connection, selectors.EVENT_READ, child)
            self.selector.register(child.ended, selectors.EVENT_READ, child)
            return None
        self._leave()
        connection.close()
        arguments, folder, environment = request
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        return list(arguments)

    def _leave(self) -> None:
        """What a fork does not need of this process."""
        self.selector.close()
        self.listener.close()
        for child in self.children.values():
            child.connection.close()
            os.close(child.ended)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _pass_on(self, child: _Child) -> None:
        """A signal for a fork; the end of the connection means that its program was killed."""
        numbers = child.connection.recv(16)
        with contextlib.suppress(ProcessLookupError):
            for number in numbers or bytes([signal.SIGTERM]):
                os.kill(child.pid, number)
        if not numbers:
            self.selector.unregister(child.connection)

    def _end(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(OSError):
            child.connection.send(bytes([code if code >= 0 else 128 - code]))
        for each in (child.connection, child.ended):
            with contextlib.suppress(KeyError):
                self.selector.unregister(each)
        child.connection.close()
        os.close(child.ended)
        del self.children[child.pid]


def _receive(connection: socket.socket) -> tuple[tuple[list[str], str, dict[str, str]], list[int]]:
    streams = array.array("i")
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_LEN(STREAMS * streams.itemsize))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            streams.frombytes(data)
    size = int.from_bytes(head, "big")
    content = b""
    while len(content) < min(size, HEADER_BYTES):
        if not (part := connection.recv(size - len(content))):
            break
        content += part
    if len(streams) != STREAMS:
        raise ValueError("no streams")
    arguments, folder, environment = json.loads(content)
    return (arguments, folder, environment), list(streams)


def serve(path: Path, modules: Iterable[str]) -> list[str] | None:
    """Imports, says so on standard output, and serves at a socket. Returns the arguments of a fork, or None."""
    request_sigterm_with_parent()
    limit_busy_waiting()  # before torch is imported
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in modules:
        importlib.import_module(name)
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if threads:  # a fork would not have them
        print(f"cannot fork: {threads}", file=sys.stderr)
        return None
    server = Server(path)
    gc.freeze()  # so that forks share the memory
    print("ready", flush=True)
    arguments = server.serve()
    if arguments is None:
        path.unlink(missing_ok=True)
    return arguments


def run_stage(arguments: list[str], client: str) -> None:
    """Runs in a fork what `python -m` would run. client: the program that asked for it."""
    sys.executable = client  # what the stage starts with it comes here, too
    sys.argv = arguments
    sys.path[0] = os.getcwd()
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def main() -> None:
    """Serves. argv: the socket, and the program that asks."""
    path, client = sys.argv[1:3]
    arguments = serve(Path(path), MODULES)
    if arguments is not None:
        run_stage(arguments, client)


if __name__ == "__main__":
    main()
