"""The machine a benchmark ran on: what it is, and how fast it reads memory."""

import ctypes
import importlib.metadata
import os
import platform
import resource
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def cpu_name():
    """Model of the CPU, and its bfloat16 instructions, which decide what that dtype is worth."""
    fields = {}
    if Path("/proc/cpuinfo").exists():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in fields.get("flags", "").split()]
    return f"{name} ({', '.join(flags) or 'no bfloat16 instructions'})"


def commit():
    """The commit that is checked out, with a ``+`` where files differ from it."""
    root = Path(__file__).parent

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short", "HEAD")
        return "none" if head.returncode else head.stdout.strip() + ("+" if git("status", "--porcelain").stdout else "")
    except OSError:  # no git here
        return "unknown"


def versions(*packages):
    """Versions of installed packages by name."""
    return {name: importlib.metadata.version(name) for name in packages}


class OtherWork:
    """How many cores programs other than this one and its children keep busy; they spoil what is measured meanwhile."""

    def __init__(self):
        self._start = self._now()

    @staticmethod
    def _now():
        user, nice, system, _, _, *interrupts = (int(n) for n in Path("/proc/stat").read_text().split()[1:9])
        own = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return time.perf_counter(), (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - own

    def cores(self):
        """Average since this object was made; children count once they have ended."""
        seconds, busy = (now - start for now, start in zip(self._now(), self._start))
        return max(0.0, busy / seconds)


# Reads all of it in vectors, with what is 4 kB ahead fetched already, as kernels that are bound by memory do.
_READER = """
#include <stdint.h>
#include <stddef.h>
typedef uint64_t vector __attribute__((vector_size(32)));
uint64_t read_all(const char *data, size_t bytes) {
  vector sums[4] = {{0}};
  for (size_t at = 0; at + 128 <= bytes; at += 128) {
    __builtin_prefetch(data + at + 4096);
    __builtin_prefetch(data + at + 4160);
    for (int i = 0; i < 4; ++i) sums[i] |= *(const vector *)(data + at + 32 * i);
  }
  vector sum = sums[0] | sums[1] | sums[2] | sums[3];
  return sum[0] | sum[1] | sum[2] | sum[3];
}
"""


def _reader():
    """``read_all(address, bytes)``, compiled; None where there is no compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "read.c"), Path(folder, "read.so")
        source.write_text(_READER)
        command = [os.environ.get("CC", "gcc"), "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True)
            read = ctypes.CDLL(str(library)).read_all
        except (OSError, subprocess.CalledProcessError):
            return None
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint64
    return read


def read_bandwidth(threads, repeat=8):
    """Bytes a second that ``threads`` threads together read from memory: the best of ``repeat`` passes over 256 MB each.

    By NumPy, which reaches some three quarters, where there is no compiler.
    """
    read, numbers = _reader(), 2**25
    if read is not None:  # ctypes lets other threads run meanwhile
        aligned = [np.ones(numbers + 4, np.int64) for _ in range(threads)]
        aligned = [array[-array.ctypes.data % 32 // 8 :][:numbers] for array in aligned]
        return _fastest(lambda array: read(array.ctypes.data, array.nbytes), aligned, repeat)
    return _fastest(np.bitwise_or.reduce, [np.ones(numbers, np.int64) for _ in range(threads)], repeat)


def _fastest(read, arrays, repeat):
    best = float("inf")
    with ThreadPoolExecutor(len(arrays)) as pool:
        for _ in range(repeat):
            start = time.perf_counter()
            list(pool.map(read, arrays))
            best = min(best, time.perf_counter() - start)
    return sum(array.nbytes for array in arrays) / best


def peak_memory():
    """Largest resident memory of this process so far, in bytes.

    Not from ``getrusage``: its figure starts at what the parent held when this process was made.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
