"""Compiles decode.cpp for this CPU, once, and loads it.

The library is kept in the user's cache folder, under a name made of the source, the flags and the CPU. Without a
compiler, or if compiling fails, there is no library, and generation uses PyTorch's operators alone.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from gpt2.errors import GPT2Error, one_line

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-Wno-psabi")
LIMITS = {"avx2": ("-march=native", "-mno-avx512f"), "default": ("-march=x86-64",)}
"""Flags for the values of ATEN_CPU_CAPABILITY, with which users limit PyTorch's instruction sets."""
COMPILE_TIMEOUT_S = 300
SWITCH = "GPT2_OPTIMIZE"
"""Environment variable: 0 turns the library and the measuring of kernels off."""


class CompileError(GPT2Error):
    """The library cannot be compiled, loaded or trusted on this machine."""


def is_off() -> bool:
    """Whether the user has turned off what depends on the machine."""
    return os.environ.get(SWITCH) == "0"


def find_compiler() -> str | None:
    """The path of a C++ compiler: $CXX, g++ or clang++."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """The folder of this user for compiled libraries and measurements."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2"


def instruction_flags() -> tuple[str, ...]:
    """The compiler's flags for the instruction sets."""
    return LIMITS.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), ("-march=native",))


def cpu_identity() -> str:
    """The model of the CPU and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "; ".join(line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags")))


def library_path() -> Path:
    """Where the library for this source and this CPU is kept."""
    facts = [SOURCE.read_bytes(), " ".join((*FLAGS, *instruction_flags())).encode(), cpu_identity().encode()]
    return cache_folder() / f"decode-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:16]}.so"


def is_possible() -> bool:
    """Whether the library is there, or can probably be compiled."""
    return sys.platform == "linux" and not is_off() and (library_path().is_file() or find_compiler() is not None)


def compile_source(target: Path) -> None:
    """Compiles the library. Raises CompileError.

    It is not linked with an OpenMP runtime, but uses the one that torch has loaded, and so torch's threads.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CompileError("no C++ compiler; install g++ for faster generation")
    with tempfile.TemporaryDirectory() as folder:
        object_file = str(Path(folder) / "decode.o")
        for command in (
            [compiler, *FLAGS, *instruction_flags(), "-c", str(SOURCE), "-o", object_file],
            [compiler, "-shared", object_file, "-o", str(target)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise CompileError(f"{compiler} failed: {error}") from error
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
                raise CompileError(f"{compiler} failed: {reason}")


class Build:
    """A process that compiles the library, checks it and puts it in its place; it outlives this one.

    The check is there too, since a library that this CPU cannot run kills its process.
    """

    def __init__(self) -> None:
        package = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - read when it has ended
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpt2.kernels"],
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )

    def has_ended(self, timeout_s: float = 0) -> bool:
        """Whether it has ended; waits up to timeout_s."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def problem(self) -> str:
        """Once it has ended: why there is no library, or an empty string."""
        if self._process.returncode == 0:
            return ""
        self._errors.seek(0)
        return one_line(CompileError(self._errors.read()), 300)


@cache
def start_build() -> Build | None:
    """Starts to compile the library, once in this process. None if it is there, or cannot be compiled here."""
    return Build() if is_possible() and not library_path().is_file() else None


def load(path: Path) -> ctypes.CDLL:
    """Loads a library. Raises CompileError."""
    try:
        library = ctypes.CDLL(str(path))
        library.scratch_bytes.restype = ctypes.c_int64
        library.max_rows.restype = ctypes.c_int32
    except (OSError, AttributeError) as error:
        raise CompileError(f"{path} cannot be loaded: {error}") from error
    return library
