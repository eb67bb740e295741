"""Programs that reach out of the sandbox: for files, secrets, the network, other processes, more rights. What
they got is in the detail of the verdict. `hostile_run.py` fills in the places between `@`.
"""

from __future__ import annotations

import platform

from hostile_programs import TOLD, Hostile

MARK = "hostile-mark"
"""Is in the name of every file that a program here tries to make."""
NOTHING = r"error: ValueError: \[\]$"


def tries(name: str, attempts: str, before: str = "", wanted: str = NOTHING) -> Hostile:
    """Each line of `attempts` is tried by itself; what must come of all is that none comes through."""
    lines = [line for line in attempts.splitlines() if line.strip()]
    body = "".join(
        f"    try:\n        got.append(({line.split('(')[0]!r}, str({line})[:200]))\n"
        "    except (OSError, AttributeError, ImportError, MemoryError, ValueError): pass\n"
        for line in lines
    )
    return Hostile(f"reach: {name}", f"import os, sys\n{before}\ndef f(x):\n    got = []\n{body}    return got\n", wanted, TOLD)  # fmt: skip


def reads(name: str, *places: str) -> Hostile:
    """File or folder, by four ways each."""
    before = (
        "import glob, ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def by_libc(path):\n"
        "    fd = libc.open(path.encode(), 0)\n"
        "    if fd < 0: raise OSError(path)\n"
        "    return os.read(fd, 200)\n"
        "def listed(path):\n"
        "    return sorted(os.listdir(path)) or None\n"
    )
    ways = ["open({!r}, 'rb').read(200)", "by_libc({!r})", "listed({!r})", "os.open({!r}, os.O_RDWR)"]
    return tries(name, "\n".join(way.format(place) for place in places for way in ways), before)


def writes(name: str, folder: str) -> Hostile:
    path, other = f"{folder}/{MARK}", f"{folder}/{MARK}-2"
    return tries(
        name,
        f"""
open({path!r}, 'w')
os.open({path!r}, os.O_CREAT | os.O_RDWR)
os.open({folder!r}, os.O_TMPFILE | os.O_RDWR)
os.mkdir({path!r})
os.mkfifo({path!r})
os.symlink('/etc/passwd', {path!r})
os.link(os.__file__, {path!r})
os.rename(os.__file__, {other!r})
os.mknod({path!r})
""",
    )


CTYPES = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def none_of(calls):
    got = []
    for name, number, *args in calls:
        ctypes.set_errno(0)
        result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if type(a) is int else a for a in args))
        if result == 0 and "fork" in name or "clone" in name and result == 0: os._exit(0)
        if result != -1 or ctypes.get_errno() != errno.EPERM: got.append((name, result, ctypes.get_errno()))
    return got
"""


STACK = """
import ctypes
def environment():
    at = ctypes.c_void_p.in_dll(ctypes.CDLL(None), 'program_invocation_name').value
    found = [ctypes.string_at(at)]
    while found[-1]:  # the kernel puts the environment behind the arguments
        at += len(found[-1]) + 1
        found.append(ctypes.string_at(at))
    return [w for w in found if w[:1].isupper() and b'=' in w and w not in (b'PYTHONHASHSEED=0', b'PWD=/')] or None.x
"""


def numbered(name: str, *calls: tuple[object, ...]) -> Hostile:
    """System calls of x86_64 by number: each must give EPERM."""
    source = f"import os, sys\n{CTYPES}\ndef f(x):\n    return none_of({list(calls)!r})\n"
    return Hostile(f"call: {name}", source, NOTHING, TOLD)


def plain(name: str, *calls: tuple[str, int]) -> Hostile:
    return numbered(name, *((call, number, 0, 0, 0, 0, 0, 0) for call, number in calls))


FILES = [
    reads("accounts", "/etc/passwd", "/etc/shadow", "/etc/hostname", "/etc/os-release"),
    reads("home", "@SECRET@", "@HOME@", "/root", "/root/.bashrc", "/home"),
    reads("the published solutions", "@DATA@", "@PACKAGES@"),
    reads("installed packages", "/usr/lib/python3/dist-packages", "/usr/local/lib", "/opt"),
    reads("the working folder", "@CWD@", "@CWD@/notes"),
    reads("the harness", "@SOURCE@", "@TMP@", "/tmp", "/var/tmp", "/dev/shm", "/run"),
    reads("the harness's process", "/proc/@PID@/environ", "/proc/@PID@/mem", "/proc/@PID@/cmdline", "/proc/@PID@/maps", "/proc/@PID@/fd"),
    reads("the first process", "/proc/1/environ", "/proc/1/maps", "/proc/1/root", "/proc/1/cwd"),
    reads("its own process", "/proc/self/environ", "/proc/self/mem", "/proc/self/maps", "/proc/self/cmdline", "/proc/self/status", "/proc/self/task"),
    reads("the kernel", "/proc/version", "/proc/mounts", "/proc/net/tcp", "/proc/kcore", "/proc/sys/kernel/core_pattern", "/sys/kernel", "/sys/class/net"),
    reads("devices", "/dev/mem", "/dev/kmsg", "/dev/tty", "/dev/ptmx", "/dev/null", "/dev/vda", "/dev/fuse", "/dev/kvm"),
    tries("descriptors of others", "glob.glob('/proc/[0-9]*/fd/*') or None.x", "import glob"),
    tries("every process", "[open(p, 'rb').read(99) for p in ('/proc/%d/environ' % n for n in (1, os.getppid(), @PID@))]"),
    tries("descriptors it has", "[n for n in range(64) if n not in (0, 1, 2, 3, 4) and os.fstat(n)]"),
    tries("the environment", "[*map(str, os.environ.items())] or None.x"),
    tries("the environment on the stack", "environment()", STACK),
    tries("to be root", "'root' if os.getuid() == 0 or os.geteuid() == 0 or os.getgid() == 0 else None.x"),
    tries("the environment of the C library", "libc_environ()", "import ctypes\ndef libc_environ():\n    e = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n    found, n = [], 0\n    while e and e[n]:\n        found += [e[n]] if not e[n].startswith((b'PYTHONHASHSEED=', b'LC_CTYPE=', b'PWD=')) else []\n        n += 1\n    return found or None.x"),
    *(writes(f"writes to {folder}", folder) for folder in ("@CWD@", "/tmp", "/dev/shm", "/var/tmp", "@HOME@", "@TMP@", "/", "/proc/self", "/run")),
    tries("writes to the staged interpreter", f"""
open(os.__file__, 'r+b')
open(os.path.dirname(os.__file__) + '/{MARK}', 'w')
open(sys.prefix + '/{MARK}', 'w')
os.unlink(os.__file__)
os.chmod(os.__file__, 0o777)
os.utime(os.__file__)
os.truncate(os.__file__, 0)
os.setxattr(os.__file__, 'user.x', b'x')
os.rmdir(sys.prefix)
"""),
    tries("writes to its own process", "open('/proc/self/comm', 'w').write('x')\nopen('/proc/self/oom_score_adj', 'w').write('-1')\nopen('/proc/self/mem', 'r+b')\nopen('/proc/self/uid_map', 'w').write('0 0 1')\nopen('/proc/self/coredump_filter', 'w').write('1')"),
    tries("temporary files", "tempfile.mkstemp()\ntempfile.mkdtemp()\ntempfile.TemporaryFile()\nopen('@STAGE@/x', 'w')", "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/tmp', '/dev/shm']"),
    tries("shared memory", "shared_memory.SharedMemory('hostile-mark', create=True, size=9)\nmultiprocessing.Queue()", "import multiprocessing\nfrom multiprocessing import shared_memory"),
]  # fmt: skip

FAMILIES = ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG", "AF_CAN"]
OTHERS = [
    *(tries(f"socket {family}", f"socket.socket(socket.{family})\nsocket.socket(socket.{family}, socket.SOCK_DGRAM)\nsocket.socket(socket.{family}, socket.SOCK_RAW)", "import socket") for family in FAMILIES),
    tries("connections", "socket.create_connection(('127.0.0.1', 22), 1)\nsocket.create_server(('', 0))\nsocket.getaddrinfo('example.org', 80)", "import socket"),
    tries("pairs that are no streams", "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_RAW)\nsocket.socketpair(socket.AF_INET)\nsocket.socketpair(socket.AF_UNIX, 0)", "import socket"),
    tries("out of a pair", """
a.connect('/run/systemd/journal/stdout')
a.connect('\\0hostile-mark')
a.bind('@CWD@/hostile-mark')
a.bind('\\0hostile-mark')
a.listen()
a.accept()
a.sendto(b'x', '\\0hostile-mark')
a.sendmsg([b'x'])
a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes(4))])
b.recvmsg(1, 99)
a.getsockopt(socket.SOL_SOCKET, 17, 12)
fcntl.fcntl(a, fcntl.F_SETOWN, @PID@)
fcntl.ioctl(a, 0x8901, bytes(4))
fcntl.ioctl(a, 0x8902, bytes(4))
fcntl.ioctl(a, 0x5452, bytes(4))
""", "import fcntl, socket\na, b = socket.socketpair()\nb.setblocking(False)"),
    tries("a loop of asyncio", """
asyncio.run(asyncio.wait_for(asyncio.open_connection('127.0.0.1', 22), 1))
asyncio.run(asyncio.start_unix_server(print, '@CWD@/hostile-mark'))
asyncio.run(asyncio.create_subprocess_exec('true'))
""", "import asyncio"),
    tries("a server", "http.server.HTTPServer(('', 0), http.server.BaseHTTPRequestHandler)\nurllib.request.urlopen('http://127.0.0.1/')", "import http.server, urllib.request"),
    tries("fork", "os.fork() or os._exit(0)\nos.forkpty()", ""),
    tries("fork bomb", "[os.fork() for _ in range(64)]"),
    tries("spawn", "os.posix_spawn('/bin/sh', ['sh'], {})\nos.spawnv(os.P_NOWAIT, '/bin/true', ['true'])\nsubprocess.run(['/bin/true'])\nsubprocess.Popen([sys.executable], preexec_fn=int)", "import subprocess"),
    tries("shell", "os.popen('id').read()\nos.system('touch @CWD@/hostile-mark') and None.x", ""),
    tries("exec", "os.execv('/bin/sh', ['sh', '-c', 'exit 0'])\nos.execv(sys.executable, ['python3', '-c', ''])\nos.execve('/proc/self/exe', ['python3'], {})\nos.fexecve\nos.execvp('true', ['true'])"),
    tries("exec from memory", "os.memfd_create('x')\nos.execve(os.memfd_create('x'), ['x'], {})"),
    tries("a pool of processes", "multiprocessing.Process(target=int).start()\nconcurrent.futures.ProcessPoolExecutor(1).submit(int).result(1)", "import multiprocessing, concurrent.futures"),
    tries("signals to others", "os.kill(os.getppid(), 0)\nos.kill(@PID@, 0)\nos.kill(-1, 0)\nos.kill(1, 0)\nos.killpg(0, 0)\nos.kill(os.getppid(), signal.SIGSTOP)\nsignal.pidfd_send_signal(0, 0)\nos.pidfd_open(@PID@)", "import signal"),
    tries("signals to itself", "os.kill(os.getpid(), signal.SIGSTOP)\nsignal.raise_signal(signal.SIGSTOP)\nsignal.pthread_kill(threading.get_ident(), signal.SIGSTOP)", "import signal, threading"),
    tries("signals by a pipe", "fcntl.fcntl(4, fcntl.F_SETOWN, @PID@)\nfcntl.fcntl(4, 10, 9)\nfcntl.fcntl(3, fcntl.F_SETOWN, os.getppid())", "import fcntl"),
    tries("other users", "os.setuid(0)\nos.setgid(0)\nos.setresuid(0, 0, 0)\nos.setgroups([0])\nos.seteuid(0)\nos.initgroups('root', 0)"),
    tries("other roots", "os.chroot('/')\nos.chdir('/')\nos.fchdir(0)\nos.setns(0) if hasattr(os, 'setns') else open('/x/x')\nos.unshare(0x10000000) if hasattr(os, 'unshare') else open('/x/x')"),
    tries("limits", "resource.setrlimit(resource.RLIMIT_CPU, (99, 99))\nresource.setrlimit(resource.RLIMIT_NPROC, (9, 9))\nresource.prlimit(0, resource.RLIMIT_AS, (-1, -1))\nresource.prlimit(@PID@, resource.RLIMIT_CPU, (1, 1))\nos.nice(-5)\nos.setpriority(0, @PID@, 5)\nos.sched_setaffinity(@PID@, [0])\nos.sched_setscheduler(0, 1, os.sched_param(1))", "import resource"),
    tries("terminal", "fcntl.ioctl(0, termios.TIOCSTI, b'x')\nfcntl.ioctl(2, termios.TIOCGWINSZ, b'x' * 8)\nos.openpty()\nos.ttyname(2)\nos.setsid()\nos.setpgid(0, 0)", "import fcntl, termios"),
]  # fmt: skip

NUMBERS = [
    plain("processes", ("fork", 57), ("vfork_", 9999), ("execve", 59), ("execveat", 322), ("wait4", 61), ("waitid", 247), ("kcmp", 312), ("pidfd_open", 434), ("pidfd_getfd", 438), ("pidfd_send_signal", 424)),
    numbered("clones", ("clone", 56, 17, 0, 0, 0, 0), ("clone", 56, 0, 0, 0, 0, 0), ("clone new user", 56, 0x10000000 | 17, 0, 0, 0, 0), ("clone of a thread with a user", 56, 0x10010900 | 0x100, 0, 0, 0, 0), ("clone of a thread with mounts", 56, 0x00030800 | 0x100, 0, 0, 0, 0)),
    plain("signals", ("kill", 62), ("tkill", 200), ("tgkill", 234), ("rt_sigqueueinfo", 129), ("rt_tgsigqueueinfo", 297)),
    plain("memory of others", ("ptrace", 101), ("process_vm_readv", 310), ("process_vm_writev", 311), ("process_madvise", 440), ("userfaultfd", 323), ("move_pages", 279), ("migrate_pages", 256), ("memfd_create", 319), ("memfd_secret", 447), ("remap_file_pages", 216), ("pkey_alloc", 330), ("modify_ldt", 154)),
    plain("network", ("socket", 41), ("connect", 42), ("accept", 43), ("sendto", 44), ("recvfrom", 45), ("sendmsg", 46), ("bind", 49), ("listen", 50), ("socketpair", 53), ("sendfile", 40), ("splice", 275), ("vmsplice", 278), ("tee", 276)),
    numbered("network by argument", ("socketpair", 53, 1, 2, 0, 0), ("socketpair", 53, 1, 0x80005, 0, 0), ("socketpair", 53, 2, 1, 0, 0), ("socketpair", 53, 16, 3, 0, 0), ("sendto with an address", 44, 9, 0, 0, 0, 1, 110), ("sendto with a high address", 44, 9, 0, 0, 0, 1 << 32, 110), ("sendto a pipe", 44, 4, 0, 0, 0, 0, 0), ("recvfrom a pipe", 45, 3, 0, 0, 0, 0, 0), ("recvmsg", 47, 9, 0, 0), ("recvmmsg", 299, 9, 0, 0, 0, 0), ("sendmmsg", 307, 9, 0, 0, 0), ("ioctl", 16, 9, 0x5452, 0)),
    plain("the kernel", ("io_uring_setup", 425), ("io_uring_enter", 426), ("bpf", 321), ("perf_event_open", 298), ("keyctl", 250), ("add_key", 248), ("request_key", 249), ("init_module", 175), ("finit_module", 313), ("delete_module", 176), ("kexec_load", 246), ("reboot", 169), ("syslog", 103), ("io_setup", 206), ("lookup_dcookie", 212), ("ioctl", 16), ("iopl", 172), ("ioperm", 173), ("personality", 135), ("acct", 163)),
    plain("namespaces", ("unshare", 272), ("setns", 308), ("mount", 165), ("umount2", 166), ("pivot_root", 155), ("chroot", 161), ("chdir", 80), ("fchdir", 81), ("open_tree", 428), ("move_mount", 429), ("fsopen", 430), ("fsmount", 432), ("mount_setattr", 442), ("sethostname", 170), ("setdomainname", 171), ("swapon", 167), ("quotactl", 179)),
    plain("rights", ("setuid", 105), ("setgid", 106), ("setreuid", 113), ("setresuid", 117), ("setresgid", 119), ("setgroups", 116), ("setfsuid", 122), ("capset", 126), ("prctl", 157), ("seccomp", 317), ("landlock_create_ruleset", 444), ("landlock_add_rule", 445), ("landlock_restrict_self", 446)),
    plain("limits and time", ("setrlimit", 160), ("prlimit64", 302), ("setpriority", 141), ("sched_setscheduler", 144), ("sched_setattr", 314), ("sched_setaffinity", 203), ("ioprio_set", 251), ("settimeofday", 164), ("clock_settime", 227), ("adjtimex", 159), ("clock_adjtime", 305)),
    plain("queues and notices", ("shmget", 29), ("shmat", 30), ("semget", 64), ("msgget", 68), ("msgsnd", 69), ("mq_open", 240), ("inotify_init", 253), ("inotify_init1", 294), ("fanotify_init", 300), ("setsid", 112), ("setpgid", 109), ("vhangup", 153)),
    plain("files", ("truncate", 76), ("rename", 82), ("mkdir", 83), ("rmdir", 84), ("creat", 85), ("link", 86), ("unlink", 87), ("symlink", 88), ("chmod", 90), ("fchmod", 91), ("chown", 92), ("mknod", 133), ("utime", 132), ("setxattr", 188), ("openat2", 437), ("mkdirat", 258), ("mknodat", 259), ("fchownat", 260), ("unlinkat", 263), ("renameat", 264), ("linkat", 265), ("symlinkat", 266), ("fchmodat", 268), ("utimensat", 280), ("fallocate", 285), ("renameat2", 316), ("copy_file_range", 326), ("name_to_handle_at", 303), ("open_by_handle_at", 304), ("flock", 73), ("sync", 162), ("fsync", 74)),
    Hostile("call: the numbering of x32", f"import os\n{CTYPES}\ndef f(x): return libc.syscall(0x40000000 | 39)", "died", TOLD),
    Hostile("call: the numbering of 32 bits", "import ctypes, mmap\ncode = b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3'\npage = mmap.mmap(-1, 4096, prot=7)\npage.write(code)\ndef f(x): return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()", "died", TOLD),
]  # fmt: skip

REACHES = [*FILES, *OTHERS, *(NUMBERS if platform.machine() == "x86_64" else [])]
