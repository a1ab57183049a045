"""kernels.cpp and its headers, compiled once for this machine and called with tensors.

Without a compiler `library()` is None and PyTorch computes.

The library is kept in the cache folder under a name that says all it was made from; nothing else is ever loaded.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from config import say
from packaged import cache_dir, made_whole

SOURCES = [
    Path(__file__).with_name(name)
    for name in ("kernels.cpp", "kernels.h", "adamw.h", "first.h", "floats.h", "lora.h", "products.h", "tape.h")
]
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
FLAGS += ["-fno-fast-math", "-fno-math-errno", "-fno-trapping-math"]  # exp is off by 0.99 where sums are reordered
FLAGS += ["-mprefer-vector-width=512"] * (platform.machine() == "x86_64")
FLAGS += ["-falign-functions=64", "-falign-loops=64"]  # else products took up to 7% longer, by luck
SIGNATURES = {  # i: int64, p: pointer, f: float; in the order of kernels.cpp's table
    "add_norm": "iipipp" + "ppf" + "ppf" + "pppipp",
    "add_norm_backward": "iippipppp" + "ppf" + "ppppp",
    "gelu": "iipppi",
    "gelu_backward": "iippip",
    "attend": "iiiii" + "ppppppp" + "ppf" + "pip",
    "attend_backward": "iiiii" + "ppppppp" + "ppf" + "ppippp",
    "lora_down": "iiiipip" + "ppf" + "pii",
    "lora_backward": "iiiipip" + "ppf" + "ppip",
    "lora_follow": "iiiiippppppp",
    "column_sums": "iipp",
    "square_sum": "ip",
    "draw": "pipiiip",
    "adamw": "ipppppp",
    "adamw_packed": "iippppppp",
    "adamw_rows": "iipppppp",
    "adamw_skipped": "iippipf" + "ppp",
    "tiles_allowed": "",
    "panel": "",
    "pack_weight": "iiippp",
    "multiply": "iiipippi",
    "gradient": "iiipipipp",
    "lora_down_tiles": "iiiipip" + "ppf" + "pii",
    "lora_up_gradient": "iiii" + "pppipip",
    "lora_backward_tiles": "iiiipip" + "ppf" + "ppip",
    "lora_refresh": "iiiiiipppppp",
    "attend_first": "iiiiii" + "pppppp" + "ppf" + "pi" + "pppp",
    "attend_first_backward": "iiiiii" + "pppppp" + "ppf" + "ppp" + "pi" + "pppipp",
    "attend_first_gradient": "iiiiii" + "pipfpp",
    "multiply_forward": "iiipipip",
    "multiply_backward": "iiipipip",
    "gradient_floats": "iiipipip",
    "lora_up_gradient_floats": "iiiipppipip",
    "cast": "iipipi",
    "add_first": "iii" + "pippip",
    "head": "iii" + "ppppp" + "ppf" + "pp",
    "head_backward": "iiippppfpppppp",
    "replay": "ip",
}
RESULTS = {"square_sum": ctypes.c_double, "tiles_allowed": ctypes.c_bool, "panel": ctypes.c_int64}
TYPES = {"i": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_float}
SLOTS = {"i": "q", "p": "Q", "f": "f4x"}  # the same on a tape: eight bytes each
WIDTH = 16  # as in kernels.h
NAMES = {torch.bfloat16: "bf16", torch.float32: "float"}


tape = None  # the tape.Tape that calls are recorded on


def whole(n: int) -> int:
    """n filled up to whole vectors."""
    return -(-n // WIDTH) * WIDTH


class Kernel(NamedTuple):
    function: Callable[..., float | None]
    unpack: int  # address of the function that takes its arguments from a tape
    form: str  # of the arguments there, for `struct`, behind that address and their number


def _compile(target: Path, compiler: list[str]) -> None:
    """The library with its SHA-256 behind it, which the loader does not read: see `_is_whole`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with made_whole(target) as made:
        command = [*compiler, *FLAGS, str(SOURCES[0]), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.write_bytes((content := made.read_bytes()) + hashlib.sha256(content).digest())


def _is_whole(path: Path) -> bool:
    """Whether it ends with the SHA-256 of the rest: to load a part of a library would end the process."""
    content = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@functools.cache
def library() -> dict[tuple[str, torch.dtype], Kernel] | None:
    """The compiled kernels by name and dtype; None where no compiler makes them: layers.py then computes."""
    if sys.platform != "linux":
        return None
    words = shlex.split(os.environ.get("CXX") or "g++")
    if (compiler := shutil.which(words[0])) is None:  # 104 samples/s instead of 328 with AMX
        say(f"note: no C++ compiler ({words[0]}): with one, training is up to three times as fast")
        return None
    try:
        stat = Path(compiler).resolve().stat()  # `--version` would be a process at every start
        about = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in about if line.startswith(("flags", "Features"))), "")
        sources = (source.read_text() for source in SOURCES)
        made_from = repr([*sources, FLAGS, words, stat.st_size, stat.st_mtime_ns, platform.machine(), processor])
        target = cache_dir() / f"kernels-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
        if not _is_whole(target):
            _compile(target, [compiler, *words[1:]])
        found = ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", "") or "").strip().splitlines() or [str(error)]
        reason = next((line for line in lines if "error" in line), lines[0])
        say(f"the CPU kernels were not compiled ({reason})")
        return None
    functions = {}
    for dtype, suffix in NAMES.items():
        table = found[f"kernels_{suffix}"]
        table.restype = ctypes.POINTER(ctypes.c_void_p * 2 * len(SIGNATURES))
        for (address, unpack), (name, signature) in zip(table().contents, SIGNATURES.items()):
            kind = ctypes.CFUNCTYPE(RESULTS.get(name), *(TYPES[letter] for letter in signature))
            form = "=Qq" + "".join(SLOTS[letter] for letter in signature)
            functions[name, dtype] = Kernel(kind(address), unpack, form)
    return functions


@functools.cache
def tiles() -> bool:
    """Whether bf16 products can run on tiles: the processor has AMX or AVX512-BF16 (products.h)."""
    return library() is not None and bool(call("tiles_allowed", torch.bfloat16))


@functools.cache
def panel() -> int:
    """What the widths of our own products in fp32 are multiples of; in bf16 it is 32."""
    return 32 if library() is None else int(call("panel", torch.float32))


def call(name: str, dtype: torch.dtype, *values: Tensor | float | None) -> float | None:
    """Run a kernel for products in `dtype`; tensors are passed by address, so their layout is the caller's duty."""
    kernel = library()[name, dtype]
    slots = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]  # `values` keeps them alive
    if tape is not None:
        tape.add(kernel.unpack, kernel.form, slots)
    return kernel.function(*slots)
