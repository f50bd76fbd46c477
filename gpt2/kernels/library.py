"""Compiles decode.cpp and prefill.cpp for this CPU, once, and loads them.

The library is kept in the user's cache folder, under a name made of the sources, the flags and the CPU. Without a
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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from gpt2.errors import GPT2Error, one_line
from gpt2.files import cache_folder

FOLDER = Path(__file__).parent
SOURCES = ("decode.cpp", "prefill.cpp")
HEADERS = ("amx.h", "model.h", "vectors.h")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-Wno-psabi")
NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
NO_BF16 = (*NO_AMX, "-mno-avx512bf16")
NO_VNNI = (*NO_BF16, "-mno-avx512vnni")
LIMITS: dict[str, dict[str, tuple[str, ...]]] = {
    "ATEN_CPU_CAPABILITY": {"AVX2": ("-mno-avx512f",), "DEFAULT": ("-march=x86-64",)},
    "ONEDNN_MAX_CPU_ISA": {
        "SSE41": ("-march=x86-64",),
        "AVX": ("-march=x86-64",),
        "AVX2": ("-mno-avx512f", "-mno-avxvnni"),
        "AVX2_VNNI": ("-mno-avx512f",),
        "AVX512_CORE": NO_VNNI,
        "AVX512_CORE_VNNI": NO_BF16,
        "AVX512_CORE_BF16": NO_AMX,
        "AVX512_CORE_FP16": NO_AMX,
    },
}
"""Flags for the environment variables with which users limit the instruction sets of PyTorch and its libraries."""
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


def instruction_flags() -> tuple[str, ...]:
    """The compiler's flags for the instruction sets."""
    limits = (flags.get(os.environ.get(name, "").upper(), ()) for name, flags in LIMITS.items())
    return ("-march=native", *(flag for each in limits for flag in each))


def cpu_identity() -> str:
    """The model of the CPU and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "; ".join(line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags")))


def library_path() -> Path:
    """Where the library for these sources and this CPU is kept."""
    facts = [(FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    facts += [" ".join((*FLAGS, *instruction_flags())).encode(), cpu_identity().encode()]
    return cache_folder() / f"kernels-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:16]}.so"


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
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        objects = [str(Path(folder) / f"{name}.o") for name in SOURCES]
        compile_only = [compiler, *FLAGS, *instruction_flags(), "-c"]
        commands = [
            [*compile_only, str(FOLDER / name), "-o", path] for name, path in zip(SOURCES, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        _run([compiler, "-shared", *objects, "-o", str(target)])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise CompileError(f"{command[0]} failed: {reason}")


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
        for function in (library.cache_bytes, library.decode_scratch_bytes, library.prefill_scratch_bytes):
            function.restype = ctypes.c_int64
        library.max_rows.restype = ctypes.c_int32
    except (OSError, AttributeError) as error:
        raise CompileError(f"{path} cannot be loaded: {error}") from error
    return library
