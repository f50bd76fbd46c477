"""Python imports this module at start-up if a test puts this folder on PYTHONPATH.

FAULT names a module, a function, and the number of a call, counted from 1. Before that call, the process sends itself a
signal and writes the time to the file FAULT_SENT. The fault applies only to a stage, not to DVC or the uploader;
FAULT_UPLOADER_FILE_BYTES limits the size of files that the uploader writes.
"""

import functools
import importlib.abc
import importlib.util
import os
import signal
import sys
import time


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
            self.strike()
            return original(*arguments, **options)

        setattr(owner, name, with_fault)

    def strike(self):
        self.left -= 1
        if self.left == 0:
            with open(self.note, "w") as file:
                file.write(repr(time.time()))
            os.kill(os.getpid(), self.number)


def install():
    command = " ".join(sys.orig_argv)
    is_uploader = "stages.sync" in command
    if "FAULT" in os.environ and "-m stages." in command and not is_uploader:
        module, function, call = os.environ["FAULT"].split(":")
        number = int(os.environ.get("FAULT_SIGNAL", int(signal.SIGTERM)))
        sys.meta_path.insert(0, Patch(module, function, int(call), number, os.environ["FAULT_SENT"]))
    if "FAULT_UPLOADER_FILE_BYTES" in os.environ and is_uploader:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = int(os.environ["FAULT_UPLOADER_FILE_BYTES"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


install()
