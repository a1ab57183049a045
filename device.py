"""The machine a run is on: its accelerator, its arithmetic, its name, and the memory the run takes of it."""

import contextlib
import functools
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

import kernels
from config import UserError


def open_device(device: str, precision: str) -> tuple[Accelerator, str]:
    """The accelerator for `--device`, and the precision `auto` means there. UserError if it is not there."""
    cuda = torch.cuda.is_available()
    kind = ("cuda" if cuda else "cpu") if device == "auto" else device.partition(":")[0]
    there = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(torch.mps.is_available())}
    if int(device.partition(":")[2] or 0) >= there[kind]:
        raise UserError(f"--device {device}: no such device; torch {torch.__version__} sees {there}")
    if ":" in device and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--device {device}: expected cuda or cpu where there are several processes: each has its own")
    if ":" in device:
        torch.cuda.set_device(device)
    if ":" in device or kind == "mps":
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    for other in ("DEEPSPEED", "MEGATRON_LM"):
        if _is_set(f"ACCELERATE_USE_{other}"):
            raise UserError(f"accelerate launch: {other} is not supported; start it with DDP, FSDP or torchrun")
    accelerator = Accelerator(cpu=kind == "cpu", mixed_precision="no")  # the loop casts for itself
    if precision == "auto":
        precision = "bf16" if _native_bf16(kind) else "fp32"
    return accelerator, precision


def wait_for_everyone(accelerator: Accelerator) -> None:
    """A barrier. accelerate's own names a GPU of this process's number for processes on the CPU, too: where there are
    fewer of them, that fails (accelerate 1.15, torch 2.13)."""
    if accelerator.device.type != "cpu":
        accelerator.wait_for_everyone()
    elif accelerator.num_processes > 1:
        dist.barrier()


@contextlib.contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process runs the block, then the others, which may wait for hours: it tokenises and fills caches."""
    if accelerator.num_processes == 1:
        yield
        return
    group = _patient_group()
    if not accelerator.is_main_process:
        dist.barrier(group)
    yield
    if accelerator.is_main_process:
        dist.barrier(group)


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    """All processes. The default group gives up a wait after 10 or 30 minutes, as it should while training."""
    return dist.new_group(timeout=timedelta(days=1), backend="gloo")


def take_fsdp() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process. UserError for a kind of FSDP that is not here.

    It is taken out of the environment: accelerate and transformers would act on it, sharded.py does it alone.
    """
    if not _is_set("ACCELERATE_USE_FSDP"):
        return False
    del os.environ["ACCELERATE_USE_FSDP"]
    strategy = os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    if strategy not in ("FULL_SHARD", "1") or _is_set("FSDP_OFFLOAD_PARAMS"):
        raise UserError(
            "accelerate launch: expected FSDP with FULL_SHARD and without offloading: no other is supported"
        )
    return True


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _native_bf16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and _capable("avx512_bf16", "amx_bf16", "bf16")


def _capable(*features: str) -> bool:
    """Whether the processor has one of them."""
    found = torch.cpu.get_capabilities()
    return any(found.get(feature) for feature in features)


def arithmetic(device: torch.device, precision: str) -> str:
    """What, beside weights and input, decides the last bits of a result: for the keys of caches."""
    by = ["torch", "alone"] if device.type == "cuda" and not dist.is_initialized() else ["torch"]  # see DeviceLayer
    if device.type == "cpu" and kernels.library():
        by = ["compiled products", *(["amx" if _capable("amx_bf16") else "tiles"] if kernels.tiles() else [])]
    return "|".join([precision, device.type, _processor(device), torch.__version__, *by])


@functools.cache
def code_hash() -> str:
    """Of this program's own files: what an earlier version has cached may be what it had computed wrong."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".py", ".cpp", ".h")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def tokens_at_once(device: torch.device) -> int:
    """How many tokens a batch without backward should have at most.

    cpu: a layer makes 11 MB of so many. 1,066 texts of 27 tokens take 1.75 s; 1.70 with 1,024 tokens, 1.83 with 256.
    """
    return 512 if device.type == "cpu" else 8192


def device_name(device: torch.device) -> str:
    """cuda: the card's name; cpu: the processor's, as the system gives it, and the number of threads. Behind it, how
    many runs a sweep lets share the machine: their times say nothing about a run alone."""
    notes = [f"{torch.get_num_threads()} threads"] if device.type == "cpu" else []
    if (at_once := int(os.environ.get("RUNS_AT_ONCE", "1"))) > 1:
        notes.append(f"{at_once} runs at once")
    name = _processor(device)
    return f"{name} ({', '.join(notes)})" if notes else name


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return device.type


class PeakMemory:
    """Peak memory of this process from when it was made: bytes allocated on a GPU, else resident in RAM.

    start: bytes with `model` loaded; None where nothing tells. In RAM gradients and moments take none before the first
    step; on a GPU they do as soon as there are any, so there it is what the weights take.
    """

    def __init__(self, device: torch.device, model: torch.nn.Module) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            tensors = (*model.parameters(), *model.buffers())
            self.start = sum(getattr(tensor, "to_local", lambda tensor=tensor: tensor)().nbytes for tensor in tensors)
        else:
            self.start = self._status("VmRSS")  # None without /proc (macOS)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew

    def peak(self) -> int:
        """Bytes. Without /proc (macOS), the peak since the process began."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if found := self._status("VmHWM"):
            return found
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @staticmethod
    def _status(key: str) -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)
