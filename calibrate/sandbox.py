"""Runs code that a task or a model wrote: no network, limits on time, memory, processes and disk.

Linux only: the isolation is the kernel's (user, network, mount and process namespaces through `unshare` of
util-linux). Where the kernel or the machine does not grant it, the run is refused, never done without it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# Inside the namespaces: one small in-memory folder is writable, every other mount is made read-only, and the process
# count is capped. The kernel exempts root from RLIMIT_NPROC, so root is capped by the namespace's own pid_max.
_SETUP = r"""
set -eu
mount -t tmpfs -o size="$DISK",mode=755 tmpfs "$STAGE/work"
cp -R "$STAGE/files/." "$STAGE/work/"
cut -d' ' -f2-4 /proc/self/mounts | while read -r point type options; do
  case "$type" in
    proc|sysfs|cgroup*|devpts|devtmpfs|mqueue|binfmt_misc|securityfs|debugfs|tracefs|bpf|pstore) continue ;;
  esac
  [ "$point" = "$STAGE/work" ] && continue
  flags=ro
  for flag in nosuid nodev noexec; do
    case ",$options," in *,$flag,*) flags="$flags,$flag" ;; esac
  done
  mount -o "remount,bind,$flags" "$point"
done
mount -t proc proc /proc
if ! echo "$PROCESSES" 2>/dev/null >/proc/sys/kernel/pid_max; then
  [ "$OUTER_UID" != 0 ] || { echo 'root needs Linux 6.14 or later; run as an ordinary user' >&2; exit 1; }
fi
cd "$STAGE/work"
echo ready >&"$READY"
eval "exec $READY>&-"
exec prlimit --cpu="$CPU" --as="$MEMORY" --nproc="$PROCESSES" --core=0 -- "$@"
"""


class SandboxError(RuntimeError):
    """The machine cannot isolate the run, so nothing was run."""


class Completed(NamedTuple):
    """What a sandboxed command did."""

    exit_code: int | None  # None where the time ran out
    output: str  # standard output and standard error together, as captured


def run(
    command: list[str],
    files: dict[str, str],
    *,
    environment: dict[str, str] | None = None,
    seconds: int = 20,
    memory_mib: int = 1024,
    processes: int = 400,
    disk_mib: int = 32,
) -> Completed:
    """Runs `command` in a fresh folder that holds `files` and returns its exit code and output.

    The word `python` in first place means this interpreter, in isolated mode for the environment but with the
    folder importable.

    Args:
        command: program and arguments, found on `PATH`; no shell is involved.
        files: relative path -> text. Paths that leave the folder are refused.
        environment: further variables; the caller's own environment is not passed on.
        seconds: wall-clock and CPU limit.
        memory_mib: address space of each process.
        processes: upper bound on process ids; at least 301, which is the kernel's lowest.
        disk_mib: size of the in-memory folder, the only writable place.

    Raises:
        SandboxError: namespaces are not granted here, or a path leaves the folder.
    """
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise SandboxError(f"file {name!r} leaves the sandbox folder; give a relative path without `..`")
    if command[0] == "python":
        command = [sys.executable, *command[1:]]
    with tempfile.TemporaryDirectory(prefix="sandbox-") as stage:
        for name, text in files.items():
            path = Path(stage, "files", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        Path(stage, "files").mkdir(exist_ok=True)
        Path(stage, "work").mkdir()
        return _run_isolated(command, stage, environment or {}, seconds, memory_mib, processes, disk_mib)


def _run_isolated(
    command: list[str],
    stage: str,
    environment: dict[str, str],
    seconds: int,
    memory_mib: int,
    processes: int,
    disk_mib: int,
) -> Completed:
    work = str(Path(stage, "work"))
    read_end, write_end = os.pipe()  # the setup script writes here once everything is isolated
    variables = {"PATH": os.defpath, "HOME": work, "TMPDIR": work, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    setup = {"STAGE": stage, "READY": str(write_end), "DISK": f"{disk_mib}m", "OUTER_UID": str(os.geteuid())}
    limits = {"CPU": str(seconds), "MEMORY": str(memory_mib * 2**20), "PROCESSES": str(processes)}
    namespaces = ["--user", "--map-root-user", "--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
    try:
        process = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", _SETUP, "sandbox", *command],
            env=variables | environment | setup | limits,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[write_end],
        )
    except FileNotFoundError as error:
        os.close(read_end)
        raise SandboxError("`unshare` is not here; the sandbox needs Linux with util-linux") from error
    finally:
        os.close(write_end)
    try:
        output = process.communicate(timeout=seconds)[0]
        exit_code = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        output, exit_code = process.communicate()[0], None
    with os.fdopen(read_end) as pipe:
        if pipe.read() != "ready\n":
            reason = output.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
            raise SandboxError(f"this machine grants no isolation ({reason[0]}); nothing was run")
    return Completed(exit_code, output.decode(errors="replace").replace(work, "/work"))
