"""Runs code that a task or a model wrote: no network, nobody's files, limits on time, memory, processes and disk.

Linux only: the isolation is the kernel's (user, network, mount and process namespaces through `unshare` of
util-linux). Where the kernel or the machine does not grant it, the run is refused, never done without it.
"""

import contextlib
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives", "/etc/ld.so.cache")
CORPORA = Path(__file__).parent / "corpora"  # hidden: they hold the checks that no model may see
SETUP_SECONDS = 60  # to isolate a run, which takes a tenth of one
POLL = 0.05  # seconds between two looks at the memory that a run holds

# Inside the namespaces: a root of its own, with this machine's programs and this interpreter read-only and nothing
# else of its files. One small in-memory folder is writable, every other mount is made read-only, and the process
# count is capped. The kernel exempts root from RLIMIT_NPROC, so root is capped by the namespace's own pid_max. Root
# also owns the disks' device nodes: hence the bare /dev. Last, all capabilities go and no further user namespace can
# be made, or the command could undo what was set up here.
_SETUP = r"""
set -eu
PATH="$PATH:/sbin:/usr/sbin"
root="$STAGE/root"
mount -t tmpfs -o size=4k,mode=555 tmpfs "$CORPORA"  # goes along wherever the folders above it are bound
mount -t tmpfs -o size=1m,mode=755 tmpfs "$root"
while IFS= read -r path; do
  if [ -d "$path" ]; then mkdir -p "$root$path"; else mkdir -p "$root${path%/*}"; : >"$root$path"; fi
  mount --rbind "$path" "$root$path"
done <"$STAGE/visible"
mkdir -p "$root$STAGE/work" "$root/dev" "$root/proc" "$root/run" "$root/outside"
mount -t tmpfs -o size="$DISK",nr_inodes=64k,mode=755 tmpfs "$root$STAGE/work"
cp -R "$STAGE/files/." "$root$STAGE/work/"
ln -s /proc/self/fd "$root/dev/fd"
for node in null zero full random urandom; do
  : >"$root/dev/$node"
  mount --bind "/dev/$node" "$root/dev/$node"
done
read -r OUTER_PID rest </proc/self/stat
export OUTER_PID
mount -t proc proc "$root/proc"
[ -z "$LOOPBACK" ] || ip link set lo up
cd "$root"
pivot_root . outside
cd /
umount -l /outside
rmdir /outside
if ! echo "$PROCESSES" 2>/dev/null >/proc/sys/kernel/pid_max; then
  [ "$OUTER_UID" != 0 ] || { echo 'root needs Linux 6.14 or later; run as an ordinary user' >&2; exit 1; }
fi
echo 0 >/proc/sys/user/max_user_namespaces
echo 0 2>/dev/null >/proc/sys/kernel/shmmni || :  # segments that nobody holds count nowhere; older kernels refuse this
cut -d' ' -f2-4 /proc/self/mounts | while read -r point type options; do
  point=$(printf %b "$point")
  [ -e "$point" ] && [ "$point" != "$STAGE/work" ] || continue
  flags=ro
  for flag in nosuid nodev noexec; do
    case ",$options," in *,$flag,*) flags="$flags,$flag" ;; esac
  done
  mount -o "remount,bind,$flags" "$point"
done
"$PYTHON" -I -S -c ''
cd "$STAGE/work"
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs -- \
  prlimit --cpu="$CPU" --as="$MEMORY" --nproc="$PROCESSES" --fsize="$DISK" --core=0 --nofile=256 -- \
  sh -c 'echo "ready $OUTER_PID" >&0; exec env -i "$@" </dev/null' sandbox "$@"
"""


class SandboxError(RuntimeError):
    """The machine cannot isolate the run, so nothing was run."""


class Completed(NamedTuple):
    """What a sandboxed command did."""

    exit_code: int | None  # None where the time ran out, 137 where the memory did (the output says so)
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
        seconds: wall-clock limit, and CPU limit of each process.
        memory_mib: address space of each process, and what all of them together hold, looked at every `POLL`.
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
        for name in ("files", "root"):
            Path(stage, name).mkdir(exist_ok=True)
        Path(stage, "visible").write_text("".join(f"{path}\n" for path in _visible()), encoding="utf-8")
        limits = {"CPU": seconds, "MEMORY": memory_mib * 2**20, "PROCESSES": processes, "DISK": disk_mib * 2**20}
        return _run_isolated(command, stage, environment or {}, limits, loopback)


def _run_isolated(
    command: list[str], stage: str, environment: dict[str, str], limits: dict[str, int], loopback: bool
) -> Completed:
    work = str(Path(stage, "work"))
    read_end, write_end = os.pipe()  # the setup script writes to its standard input once everything is isolated
    variables = {"PATH": os.defpath, "HOME": work, "TMPDIR": work, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    assignments = [f"{name}={value}" for name, value in (variables | environment).items()]
    setup = {"PATH": os.defpath, "STAGE": stage, "OUTER_UID": str(os.geteuid()), "LOOPBACK": "1" * loopback,
             "PYTHON": sys.executable, "CORPORA": str(CORPORA)}  # fmt: skip
    # The kernel ends the run with us: a signal that ends us reaches no other session.
    isolate = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--user", "--map-root-user", "--net", "--mount"]
    isolate += ["--pid", "--ipc", "--fork", "--kill-child", "--"]
    with os.fdopen(read_end) as pipe, tempfile.TemporaryFile("a+b") as captured:
        try:
            process = subprocess.Popen(
                [*isolate, "sh", "-c", _SETUP, "sandbox", *assignments, *command],
                env=setup | {name: str(limit) for name, limit in limits.items()},
                stdin=write_end,
                stdout=captured,  # a file, so that the limit on file size holds for the output too
                stderr=subprocess.STDOUT,
                start_new_session=True,  # signals cross namespaces within a process group: `kill(0, 9)` would end us
            )
        except FileNotFoundError as error:
            raise SandboxError("`setpriv` is not here; the sandbox needs Linux with util-linux") from error
        finally:
            os.close(write_end)
        try:
            if not select.select([pipe], [], [], SETUP_SECONDS)[0]:
                process.kill()
            ready = re.fullmatch(r"ready (\d+)\n", pipe.readline())
            stopped = _watch(process, ready[1], limits) if ready else ""
            exit_code = {"": process.wait(), "time": None, "memory": 137}[stopped]
        finally:
            process.kill()  # where an exception ends the wait
        captured.seek(0)
        output = captured.read().decode(errors="replace")
        if not ready:
            reason = output.strip().splitlines()[-1:] or ["no reason given"]
            raise SandboxError(f"this machine grants no isolation ({reason[0]}); nothing was run")
    if stopped == "memory":
        output += f"\nstopped: more than {limits['MEMORY'] >> 20} MiB of memory in all\n"
    return Completed(exit_code, output.replace(work, "/repo"))


def _watch(process: subprocess.Popen, init: str, limits: dict[str, int]) -> str:
    """Waits for a run, and ends it where its "time" or "memory" is over; says which, or nothing.

    A limit of the kernel on the memory of several processes takes a control group, which few users may make.
    """
    deadline = time.monotonic() + limits["CPU"]
    while True:
        try:
            process.wait(POLL)
            return ""
        except subprocess.TimeoutExpired:
            over = "time" if time.monotonic() > deadline else "memory" if _held(init) > limits["MEMORY"] else ""
        if over:
            process.kill()
            process.wait()
            return over


def _held(init: str) -> int:
    """Bytes that the processes of a sandbox hold, files aside; `init` is its first one's id.

    What forked processes still share counts for each of them: to tell it apart takes each one's lock, and a fork bomb
    keeps whoever asks for those waiting until long after the time limit.
    """
    processes = f"/proc/{init}/root/proc"  # its own, which lists no others
    total, unnamed = 0, {}
    try:
        for name in filter(str.isdigit, os.listdir(processes)):
            try:
                status = Path(processes, name, "status").read_text(encoding="ascii", errors="replace")
            except (FileNotFoundError, ProcessLookupError):  # this one has ended
                continue
            held = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.MULTILINE)
            total += sum(int(kib) << 10 for kib in held)
            unnamed |= _unnamed(Path(processes, name, "fd"))
    except (FileNotFoundError, ProcessLookupError):  # all have
        return 0
    return total + sum(unnamed.values())


def _unnamed(folder: Path) -> dict[tuple[int, int], int]:
    """Bytes of the files in memory alone (memfd) that a process has open, by device and inode."""
    found = {}
    with contextlib.suppress(OSError):  # it has ended
        for descriptor in os.listdir(folder):
            with contextlib.suppress(OSError):  # it has closed this one
                if os.readlink(folder / descriptor).startswith("/memfd:"):
                    file = os.stat(folder / descriptor)
                    found[file.st_dev, file.st_ino] = file.st_blocks * 512
    return found


def _visible() -> list[str]:
    """The folders of this machine that a run may read: `SYSTEM`, this interpreter's, and where its libraries are."""
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    libraries = re.findall(r"(/\S*/lib(?:64)?(?:/\S*)?)/[^/\s]+\.so[^/\s]*$", mapped, re.MULTILINE)
    interpreter = Path(sys.executable).resolve().parents[1]
    found: list[str] = []
    for path in sorted({*SYSTEM, sys.prefix, sys.base_prefix, str(interpreter), *libraries}):
        if os.path.exists(path) and not any(path.startswith(f"{outer}/") for outer in found):
            found.append(path)
    return found
