"""Python imports this module at start-up if a test puts this folder on PYTHONPATH.

FAULT names a module, a function, and the number of a call, counted from 1. At that call, the process writes the time to
the file FAULT_SENT and does what FAULT_KIND says: it sends itself a signal (the default), has too little memory or
disk, hangs, fails, or gets NaN. That happens once, in a stage, not in DVC or the uploader; with FAULT_RANK, in one of
several processes. FAULT_UPLOADER_FILE_BYTES limits the size of files that the uploader writes.
"""

import functools
import importlib.abc
import importlib.util
import os
import signal
import sys
import time

KIND = os.environ.get("FAULT_KIND", "signal")
DISK_BYTES = 10_000
"""Room for reports and records; too little for a checkpoint of the smallest model."""


class Patch(importlib.abc.MetaPathFinder):
    """Wraps a function of a module as soon as the module is imported."""

    def __init__(self, module, function, call, number, note):
        self.module, self.function, self.left, self.number, self.note = module, function, call, number, note

    def find_spec(self, name, path, target=None):
        if name != self.module:
            return None
        if not self.function:
            self.strike()
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.wrap(module)

        spec.loader.exec_module = exec_module
        return spec

    def wrap(self, module):
        *owners, name = self.function.split(".")
        owner = functools.reduce(getattr, owners, module)
        original = getattr(owner, name)

        @functools.wraps(original)
        def with_fault(*arguments, **options):
            strikes = self.strike()
            result = original(*arguments, **options)
            return result * float("nan") if strikes and KIND == "nan" else result

        setattr(owner, name, with_fault)

    def strike(self):
        self.left -= 1
        if self.left != 0:
            return False
        with open(self.note, "w") as file:
            file.write(repr(time.time()))
        if KIND == "signal":
            os.kill(os.getpid(), self.number)
        elif KIND == "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        elif KIND == "hang":
            while True:
                time.sleep(1)
        elif KIND == "error":
            raise ValueError("a bug")
        elif KIND == "disk":
            limit_files(DISK_BYTES)
        return True


def limit_files(limit):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def install():
    command = " ".join(sys.orig_argv)
    is_uploader = "stages.sync" in command
    is_meant = os.environ.get("FAULT_RANK") == os.environ.get("RANK") and not os.path.exists(
        os.environ.get("FAULT_SENT", "")
    )
    if "FAULT" in os.environ and "-m stages." in command and not is_uploader and is_meant:
        module, function, call = os.environ["FAULT"].split(":")
        number = int(os.environ.get("FAULT_SIGNAL", int(signal.SIGTERM)))
        sys.meta_path.insert(0, Patch(module, function, int(call), number, os.environ["FAULT_SENT"]))
    if "FAULT_UPLOADER_FILE_BYTES" in os.environ and is_uploader:
        limit_files(int(os.environ["FAULT_UPLOADER_FILE_BYTES"]))


install()
