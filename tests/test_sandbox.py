import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibrate import sandbox

# Creates a file in each folder that it is given and names the folders where that worked.
PROBE = """
import pathlib, sys
for folder in sys.argv[1:]:
    path = pathlib.Path(folder, "written-by-the-sandbox")
    try:
        path.write_text("x")
    except OSError:
        continue
    path.unlink()
    print(folder)
"""
REMOUNT = """
cut -d' ' -f2 /proc/self/mounts | while read -r point; do mount -o remount,bind,rw "$point" 2>/dev/null; done
exec "$@"
"""


def test_exit_code_and_output():
    """Both streams are captured in order, the folder is importable, and its name is /repo."""
    main = """
import os, sys
from package.helper import WORD
print(WORD, flush=True)
print(os.getcwd(), file=sys.stderr)
sys.exit(3)
"""
    completed = sandbox.run(["python", "main.py"], {"main.py": main, "package/helper.py": "WORD = 'grün'\n"})
    assert completed == sandbox.Completed(3, "grün\n/repo\n")


def test_the_callers_environment_is_not_passed_on(monkeypatch):
    """A task's own variable may have any name, those that the setup uses included."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    lines = sandbox.run(["env"], {}, environment={"DISK": "7"}).output.splitlines()
    assert {line.split("=")[0] for line in lines} == {
        "PATH", "HOME", "TMPDIR", "LANG", "PYTHONDONTWRITEBYTECODE", "DISK",
    }  # fmt: skip
    assert "DISK=7" in lines


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        socket.create_connection(address).close()  # reachable from here
        code = f"import socket; print('before', flush=True); socket.create_connection({address!r}, timeout=5)"
        completed = sandbox.run(["python", "-c", code], {})
    assert completed.exit_code == 1
    assert completed.output.startswith("before\n")
    assert "Network is unreachable" in completed.output


@pytest.mark.parametrize(
    "loop",
    [
        pytest.param("import signal\nsignal.pause()", id="idle process"),
        pytest.param("import os\nwhile True:\n try: os.fork()\n except OSError: pass", id="fork loop"),
    ],
)
def test_the_time_limit_ends_every_process(loop, tmp_path):
    """What was printed before is kept; the folder's name on the command line finds what still ends a moment later."""
    command = ["python", "-c", f"print('begun', flush=True)\n{loop}", str(tmp_path)]
    assert sandbox.run(command, {}, seconds=1, memory_mib=8192) == sandbox.Completed(None, "begun\n")
    deadline = time.monotonic() + 60  # of a busy machine; a process that survives is there for ever
    while (alive := _command_lines_with(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def _command_lines_with(word: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode()
        except OSError:  # it ended meanwhile
            continue
        if word in line:
            found.append(line)
    return found


@pytest.mark.parametrize(
    ("code", "limit", "shown", "message"),
    [
        ("for size in 100, 300: bytearray(size << 20); print(size)", {"memory_mib": 200}, "100\n", "MemoryError"),
        (
            "for i in '1234': open(i, 'wb').write(bytes(12 * 2**20)); print(i)",
            {"disk_mib": 40},
            "1\n2\n3\n",
            "No space",
        ),
    ],
)
def test_memory_and_disk_are_limited(code, limit, shown, message):
    """200 MiB of memory hold 100 but not 300; 40 MiB of disk hold three files of 12 but not the fourth."""
    completed = sandbox.run(["python", "-u", "-c", code], {}, **limit)
    assert completed.exit_code == 1
    assert completed.output.startswith(f"{shown}Traceback")
    assert message in completed.output.splitlines()[-1]


@pytest.mark.parametrize(("children", "code"), [(1, 0), (4, 137)])
def test_memory_of_all_processes_together_is_limited(children, code):
    """256 MiB: one child may hold 100, four may not, though each has less than the limit."""
    script = f"""
import os, time
print("begun", flush=True)
for _ in range({children}):
    if not os.fork():
        held = b"x" * (100 << 20)
        time.sleep(2)
        os._exit(0)
for _ in range({children}):
    os.wait()
"""
    completed = sandbox.run(["python", "-c", script], {}, memory_mib=256)
    assert completed.exit_code == code
    assert completed.output == "begun\n" + "\nstopped: more than 256 MiB of memory in all\n" * (code == 137)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (
            "import os, time\nfor i in range({n}):\n    os.write(os.memfd_create(str(i)), b'x' * (30 << 20))\n"
            "time.sleep(1)",
            137,
        ),
        (
            "import ctypes\nlibc = ctypes.CDLL(None)\nfor i in range({n}):\n"
            "    if libc.shmget(0, 100 << 20, 0o1600) < 0:\n        raise SystemExit(3)",
            3,
        ),
    ],
    ids=["memfd", "segments"],
)
def test_memory_that_no_process_maps_is_limited_too(code, exit_code):
    """256 MiB: two files of 30 MiB in memory alone may be held, twenty not; System V segments not at all."""
    assert sandbox.run(["python", "-c", code.format(n=20)], {}, memory_mib=256).exit_code == exit_code
    assert sandbox.run(["python", "-c", code.format(n=2 * (exit_code == 137))], {}, memory_mib=256).exit_code == 0


def test_a_signal_to_the_whole_group_stays_inside():
    """In a session of its own: without the fix it would end the tests."""
    inside = "import os; os.kill(0, 9)"
    code = (
        f"from calibrate import sandbox\nprint(sandbox.run(['python', '-c', {inside!r}], {{}}).exit_code, 'survived')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert "survived" in found.stdout, found


def test_a_run_ends_with_whoever_asked_for_it(tmp_path):
    command = ["python", "-c", "import signal\nsignal.pause()", str(tmp_path)]
    asker = subprocess.Popen([sys.executable, "-"], stdin=subprocess.PIPE, text=True)  # no word on its command line
    asker.stdin.write(f"from calibrate import sandbox\nsandbox.run({command}, {{}}, seconds=600)\n")
    asker.stdin.close()
    deadline = time.monotonic() + 60  # of a busy machine
    while not (begun := _command_lines_with(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.05)
    asker.terminate()
    asker.wait()
    while (alive := _command_lines_with(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert begun
    assert not alive


def test_output_is_limited():
    """Of 9 MiB that are printed, 2 arrive: the file that takes the output has the limit of the disk."""
    code = "import os\nfor _ in range(9): os.write(1, b'y' * 2**20)"
    completed = sandbox.run(["python", "-c", code], {}, disk_mib=2)
    assert completed.exit_code not in (0, None)
    assert completed.output == "y" * 2**21


def test_processes_are_limited():
    """Every child stays; the ids run out before the limit, below which the sandbox's own setup has taken some."""
    code = """
import os, signal
count = 0
while True:
    try:
        child = os.fork()
    except BlockingIOError:
        break
    if not child:
        signal.pause()
    count += 1
print(count)
"""
    completed = sandbox.run(["python", "-c", code], {}, processes=320, memory_mib=8192)
    assert completed.exit_code == 0
    assert 100 < int(completed.output) < 320


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param([], id="as it is"),
        pytest.param(["sh", "remount.sh"], id="after making the mounts writable again"),
        pytest.param(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "remount.sh"], id="from new namespaces"
        ),
    ],
)
def test_nothing_outside_the_folder_can_be_written(attempt, tmp_path):
    """The folder itself can, whichever way the probe is started."""
    places = [".", tmp_path, Path.home(), Path.cwd(), "/dev/shm", "/dev", "/tmp", "/run", "/sys/fs/cgroup", "/proc"]
    probe = [sys.executable, "probe.py", *map(str, places)]
    script = '"$@" || shift $SKIP; exec "$@"'  # where the attempt itself is refused, the probe runs without it
    completed = sandbox.run(
        ["sh", "-c", script, "sh", *attempt, *probe],
        {"probe.py": PROBE, "remount.sh": REMOUNT},
        environment={"SKIP": str(len(attempt))},
    )
    lines = set(completed.output.splitlines())
    assert "." in lines
    assert not lines & {str(place) for place in places[1:]}
    assert list(tmp_path.iterdir()) == []


def test_nothing_outside_the_folder_can_be_read_but_programs_and_the_interpreter(tmp_path):
    (tmp_path / "note.txt").write_text("of the caller")
    (task, *_) = sandbox.CORPORA.glob("behaviour/*.yaml")
    hidden = [task, tmp_path / "note.txt", Path(__file__), Path(__file__).parents[1] / ".git" / "HEAD", "/etc/shadow"]
    code = """
import os, sys
for path in sys.argv[1:]:
    try:
        open(path).close()
        print(path)
    except OSError:
        pass
print(sorted(os.listdir(os.environ["HOME"])))
"""
    completed = sandbox.run(["python", "look.py", *map(str, hidden)], {"look.py": code})
    assert completed == sandbox.Completed(0, "['look.py']\n")


def test_the_corpora_are_hidden_where_they_lie_beside_the_interpreters_packages(monkeypatch):
    """As in an installed package; the folder of `json` stands in for them."""
    monkeypatch.setattr(sandbox, "CORPORA", Path(json.__file__).parent)
    completed = sandbox.run(["python", "-c", f"import os; print(os.listdir({str(sandbox.CORPORA)!r}))"], {})
    assert completed == sandbox.Completed(0, "[]\n")


def test_kernel_settings_and_capabilities_are_out_of_reach():
    """A caller who is root owns /proc/sys: what may be opened there would change the machine."""
    code = """
import os, subprocess
print(subprocess.call(["unshare", "--user", "true"], stderr=subprocess.DEVNULL))  # a new user has all capabilities
print(open("/proc/self/status").read().split("CapEff:")[1].split()[0])
for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/pid_max", "/proc/sys/user/max_user_namespaces"):
    try:
        os.close(os.open(path, os.O_WRONLY))
        print(path)
    except OSError:
        pass
print(sorted(os.listdir("/dev")), set(os.listdir("/run")) - {"mount"})  # `mount` keeps notes there
"""
    completed = sandbox.run(["python", "-c", code], {})
    assert completed.output == f"1\n{0:016x}\n['fd', 'full', 'null', 'random', 'urandom', 'zero'] set()\n"


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "folder/../../outside.txt"])
def test_a_path_that_leaves_the_folder_is_refused(name):
    with pytest.raises(sandbox.SandboxError, match=rf"file '{name}' leaves the sandbox folder; give a relative path"):
        sandbox.run(["true"], {name: "x"})


def test_without_util_linux_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "defpath", str(tmp_path))
    with pytest.raises(sandbox.SandboxError, match="`setpriv` is not here; the sandbox needs Linux with util-linux"):
        sandbox.run(["true"], {})


def test_an_interpreter_that_cannot_start_inside_is_an_error_and_no_failure_of_the_code(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(sandbox.SandboxError, match=rf"no isolation \(.*{tmp_path}/bin/python.*not found\)"):
        sandbox.run(["python", "-c", "1"], {})


@pytest.mark.parametrize("tool", ["unshare", "mount", "pivot_root", "umount", "setpriv", "prlimit"])
def test_where_a_step_of_the_isolation_fails_nothing_runs(tool, monkeypatch, tmp_path):
    """The tool stands in for a machine that refuses that step."""
    refusing = tmp_path / tool
    refusing.write_text("#!/bin/sh\necho 'Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(os, "defpath", f"{tmp_path}:{os.defpath}")
    monkeypatch.setattr(sandbox, "SYSTEM", (*sandbox.SYSTEM, str(tmp_path)))  # the later steps look inside
    with pytest.raises(sandbox.SandboxError, match=r"no isolation \(Operation not permitted\); nothing was run"):
        sandbox.run(["true"], {})
