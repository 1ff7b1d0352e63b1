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
# count is capped. The kernel exempts root from RLIMIT_NPROC, so root is capped by the namespace's own pid_max. Root
# also owns the disks' device nodes and the services' sockets: hence the bare /dev and the empty /run. Last, all
# capabilities go and no further user namespace can be made, or the command could undo what was set up here.
_SETUP = r"""
set -eu
mount -t tmpfs -o size="$DISK",nr_inodes=64k,mode=755 tmpfs "$STAGE/work"
cp -R "$STAGE/files/." "$STAGE/work/"
mount -t tmpfs -o size=64k,mode=755 tmpfs "$STAGE/dev"
ln -s /proc/self/fd "$STAGE/dev/fd"
for node in null zero full random urandom; do
  : >"$STAGE/dev/$node"
  mount --bind "/dev/$node" "$STAGE/dev/$node"
done
mount --rbind "$STAGE/dev" /dev
mount -t tmpfs -o size=64k,mode=755 tmpfs /run
mount -t proc proc /proc
[ -z "$LOOPBACK" ] || ip link set lo up
if ! echo "$PROCESSES" 2>/dev/null >/proc/sys/kernel/pid_max; then
  [ "$OUTER_UID" != 0 ] || { echo 'root needs Linux 6.14 or later; run as an ordinary user' >&2; exit 1; }
fi
echo 0 >/proc/sys/user/max_user_namespaces
cut -d' ' -f2-4 /proc/self/mounts | while read -r point type options; do
  point=$(printf %b "$point")
  [ -e "$point" ] && [ "$point" != "$STAGE/work" ] || continue
  flags=ro
  for flag in nosuid nodev noexec; do
    case ",$options," in *,$flag,*) flags="$flags,$flag" ;; esac
  done
  mount -o "remount,bind,$flags" "$point"
done
cd "$STAGE/work"
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs -- \
  prlimit --cpu="$CPU" --as="$MEMORY" --nproc="$PROCESSES" --fsize="$DISK" --core=0 -- \
  sh -c 'echo ready >&0; exec env -i "$@" </dev/null' sandbox "$@"
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
    loopback: bool = False,
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
        disk_mib: size of the in-memory folder, the only writable place, and the most that the output may hold.
        loopback: bring up the sandbox's own loopback interface (with `ip` of iproute2), for a service that the command
            starts and asks; it leads nowhere else.

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
        for name in ("files", "work", "dev"):
            Path(stage, name).mkdir(exist_ok=True)
        limits = {"CPU": seconds, "MEMORY": memory_mib * 2**20, "PROCESSES": processes, "DISK": disk_mib * 2**20}
        return _run_isolated(command, stage, environment or {}, limits, loopback)


def _run_isolated(
    command: list[str], stage: str, environment: dict[str, str], limits: dict[str, int], loopback: bool
) -> Completed:
    work = str(Path(stage, "work"))
    read_end, write_end = os.pipe()  # the setup script writes to its standard input once everything is isolated
    variables = {"PATH": os.defpath, "HOME": work, "TMPDIR": work, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    assignments = [f"{name}={value}" for name, value in (variables | environment).items()]
    setup = {"PATH": os.defpath, "STAGE": stage, "OUTER_UID": str(os.geteuid()), "LOOPBACK": "1" * loopback}
    namespaces = ["--user", "--map-root-user", "--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
    with os.fdopen(read_end) as pipe, tempfile.TemporaryFile("a+b") as captured:
        try:
            process = subprocess.Popen(
                ["unshare", *namespaces, "sh", "-c", _SETUP, "sandbox", *assignments, *command],
                env=setup | {name: str(limit) for name, limit in limits.items()},
                stdin=write_end,
                stdout=captured,  # a file, so that the limit on file size holds for the output too
                stderr=subprocess.STDOUT,
            )
        except FileNotFoundError as error:
            raise SandboxError("`unshare` is not here; the sandbox needs Linux with util-linux") from error
        finally:
            os.close(write_end)
        try:
            exit_code = process.wait(limits["CPU"])
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            exit_code = None
        captured.seek(0)
        output = captured.read().decode(errors="replace")
        if pipe.read() != "ready\n":
            reason = output.strip().splitlines()[-1:] or ["no reason given"]
            raise SandboxError(f"this machine grants no isolation ({reason[0]}); nothing was run")
    return Completed(exit_code, output.replace(work, "/repo"))
