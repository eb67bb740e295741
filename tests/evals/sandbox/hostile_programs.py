"""Programs that want to pass without the right answer: each with what must come of it. Standard library only;
`hostile_run.py` runs them. Those that reach for the machine are in `hostile_reaches.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

GUESS = "def check(candidate):\n    assert candidate(21) == TOKEN\n"
"""TOKEN is another 60-bit number in each run: who answers it has seen the test."""
DOUBLE = "def check(candidate):\n    assert candidate(21) == 42\n"
"""For programs that answer rightly and misbehave beside it."""
TOLD = "def check(candidate):\n    raise ValueError(candidate(21))\n"


@dataclass(frozen=True)
class Hostile:
    name: str
    source: str
    wanted: str
    """A regular expression of what `status: detail` begins with."""
    test: str = GUESS
    cpu_s: float = 2.0
    """Small for those that never end: their wall clock is four times it, and a little."""


def calls(name: str, body: str, wanted: str, test: str = GUESS, cpu_s: float = 2.0) -> Hostile:
    """A program whose function, once called with `x`, does `body`."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return Hostile(name, f"import os, sys\ndef f(x):\n{lines}", wanted, test, cpu_s)


def answers(name: str, value: str, wanted: str, cpu_s: float = 2.0) -> Hostile:
    """A program that writes its own frame of JSON, with the right id."""
    body = f"send_raw({value})\nos._exit(0)"
    return Hostile(name, f"{RAW}\ndef f(x):\n" + indented(body), wanted, cpu_s=cpu_s)


def indented(body: str) -> str:
    return "".join(f"    {line}\n" for line in body.splitlines())


RAW = """
import json, os, sys, threading, time
def frame_of_main():
    frame = sys._getframe()
    while frame and not ("requests" in frame.f_locals and "answers" in frame.f_locals):
        frame = frame.f_back
    return frame
def asked():
    return frame_of_main().f_locals["request"]["id"]
def framed(body):
    return len(body).to_bytes(4, "big") + body
def write_all(data):
    while data:
        data = data[os.write(4, data):]
def send_raw(fields):
    body = '{"id": "%s", %s}' % (asked(), fields)
    write_all(framed(body.encode()))
"""

GONE = "died: it exited before it answered"
EXITS = [
    Hostile("exit at import", "import sys\nsys.exit(0)", "error: it raised SystemExit"),
    Hostile("SystemExit at import", "raise SystemExit(0)", "error: it raised SystemExit"),
    Hostile("hard exit at import", "import os\nos._exit(0)", GONE),
    Hostile("exit in a decorator", "import os\n@os._exit\ndef f(x): return x", "error: TypeError"),
    Hostile("exit in a default", "import os\ndef f(x=os._exit(0)): return x", GONE),
    Hostile("no function at all", "print('passed')", "error: KeyError"),
    Hostile("does not parse", "def f(x:\n", "error: SyntaxError"),
    Hostile("null byte", "def f(x): return 1\0", "error: (ValueError|SyntaxError)"),
    Hostile("not callable", "f = 42", "error: TypeError"),
    calls("exit in the call", "sys.exit(0)", "error: it raised SystemExit"),
    calls("exit code None", "sys.exit()", "error: it raised SystemExit"),
    calls("hard exit in the call", "os._exit(0)", GONE),
    calls("exit in __del__", "class D:\n    def __del__(self): os._exit(0)\nD()\nreturn 1", GONE),
    calls("exit at exit", "import atexit\natexit.register(os._exit, 0)\nreturn 0", "failed: an assertion"),
    calls("exit in a thread", "import threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(9)", GONE),
    calls("exit in a signal handler", "import signal, time\nsignal.signal(14, lambda *_: os._exit(0))\nsignal.alarm(1)\ntime.sleep(9)", GONE),
    calls("exit in __repr__ of what is raised", "class E(Exception):\n    def __str__(self): os._exit(0)\nraise E", GONE),
    calls("abort", "os.abort()", GONE),
    calls("segmentation fault", "import ctypes\nctypes.string_at(0)", GONE),
    calls("interrupt", "raise KeyboardInterrupt", "error: it raised KeyboardInterrupt"),
    calls("generator exit", "raise GeneratorExit", "error: it raised GeneratorExit"),
]  # fmt: skip

EQUAL = "__eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda *_: True\n"
KINDS = ["int", "float", "complex", "str", "bytes", "list", "tuple", "dict", "set", "frozenset", "object"]


def lies(name: str, kind: str, value: str, test: str = GUESS, body: str = EQUAL) -> Hostile:
    source = f"class Liar({kind}):\n    {body}    __hash__ = lambda _: 0\ndef f(x):\n    return {value}\n"
    return Hostile(name, source, "error: it answered: a .+ is not a plain literal", test)


LIES = [
    *(lies(f"a {kind} that equals all", kind, "Liar()") for kind in KINDS),
    lies("a liar in a list", "int", "[Liar()]", "def check(candidate):\n    assert candidate(21) == [TOKEN]\n"),
    lies("a liar as a key", "str", "{Liar('a'): 1}", "def check(candidate):\n    assert 'TOKEN' in candidate(21)\n"),
    lies("a liar in a set", "int", "{Liar()}", "def check(candidate):\n    assert candidate(21) == {TOKEN}\n"),
    lies("truth", "object", "Liar()", "def check(candidate):\n    assert candidate(21)\n", "__bool__ = lambda _: True\n"),
    lies("length", "list", "Liar()", "def check(candidate):\n    assert len(candidate(21)) > 9\n", "__len__ = lambda _: 99\n"),
    lies("index", "object", "Liar()", "def check(candidate):\n    assert [0, 1][candidate(21)]\n", "__index__ = lambda _: 1\n"),
    lies("subtraction", "object", "Liar()", "def check(candidate):\n    assert abs(candidate(21) - TOKEN) < 1e-6\n", "__sub__ = lambda *_: 0\n"),
    lies("its class", "object", "Liar()", "def check(candidate):\n    assert isinstance(candidate(21), int)\n", "__class__ = int\n"),
    lies("pickle", "object", "Liar()", body="__reduce__ = lambda _: (eval, ('1',))\n"),
    lies("a generator", "object", "(i for i in range(9))"),
    lies("a type", "object", "Liar"),
    lies("a function", "object", "lambda *_: True"),
    lies("a module", "object", "__import__('os')"),
    lies("NotImplemented", "object", "NotImplemented"),
    lies("an ellipsis", "object", "..."),
    lies("a range", "object", "range(9)"),
    calls("an enumerated int", "import enum\nreturn enum.IntEnum('E', 'A').A", "error: it answered: a E is"),
    calls("a name tuple", "import collections\nreturn collections.namedtuple('T', 'a')(1)", "error: it answered: a T is"),
    calls("no number", "return float('nan')", "failed", "def check(candidate):\n    x = candidate(21)\n    assert x == x\n"),
    calls("a list that holds itself", "a = []\na.append(a)\nreturn a", "error: it answered: nested too deep"),
    calls("deep nesting", "a = []\nfor _ in range(99): a = [a]\nreturn a", "error: it answered: nested too deep"),
    calls("too many values", "return [0] * 10**6", "error: it answered: too many values"),
    calls("too long a text", "return 'x' * (5 << 20)", "error: it answered: .* bytes are too many"),
    calls("a lone surrogate", "return chr(0xd800)", "failed: an assertion"),
]  # fmt: skip

WALKS = [
    calls("frames", "frame, found = sys._getframe(), 0\nwhile frame:\n    for v in [*frame.f_locals.values(), *frame.f_code.co_consts, *frame.f_globals.values()]:\n        found = v if type(v) is int and v > 10**17 else found\n    frame = frame.f_back\nreturn found", "failed: an assertion"),
    calls("garbage collector", "import gc, types\nfor o in gc.get_objects():\n    for v in (o.values() if type(o) is dict else o if type(o) in (list, tuple) else getattr(o, '__code__', f.__code__).co_consts):\n        if type(v) is int and 10**17 < v < 2**62: return v\nreturn 0", "failed: an assertion"),
    calls("traceback", "import traceback\ntry: 1 / 0\nexcept Exception as e: return ''.join(traceback.format_stack()) + repr(traceback.extract_tb(e.__traceback__))", "failed: an assertion"),
    calls("source of the caller", "import inspect\nfor frame in inspect.stack():\n    if 'TOK' + 'EN' in str(frame.code_context) or 'check' in frame.function: return frame.frame.f_code.co_consts\nreturn 0", "failed: an assertion"),
    calls("the main module", "import __main__\nreturn {k: v for k, v in vars(__main__).items() if type(v) in (int, str)}", "(failed|error)"),
    calls("the judge's module", "import potstill.evals.sandbox.judge", "error: ModuleNotFoundError"),
    calls("the command line", "return sorted(w for w in sys.orig_argv if '10' in w and 'assert' in w)", r"failed"),
]  # fmt: skip

FORGED = '{"status": "passed", "detail": ""}'
EVERYWHERE = """
for number in range(3, 64):
    try: os.write(number, DATA)
    except OSError: pass
"""
PROTOCOL = [
    Hostile("verdict on every descriptor", f"{RAW}DATA = {FORGED.encode()!r}{EVERYWHERE}def f(x): return 1", "died: broken protocol"),
    Hostile("framed verdict on every descriptor", f"{RAW}DATA = framed({FORGED.encode()!r}){EVERYWHERE}def f(x): return 1", "died: broken protocol: an answer to no request"),
    Hostile("verdict on standard output", f"{RAW}\ndef f(x):\n    for n in (0, 1, 2):\n        os.write(n, {FORGED.encode()!r})\n    print({FORGED!r}, flush=True)\n    return 1", "failed: an assertion"),
    Hostile("ready before it was asked", f"{RAW}os.write(4, framed(b'{{\"id\": \"0\", \"ready\": true}}'))\ndef f(x): return 1", "died: broken protocol: an answer to no request"),
    Hostile("goodbye in place of ready", f"{RAW}send_raw('\"end\": true')\nos._exit(0)", "error: it raised None"),
    answers("goodbye in place of an answer", "'\"end\": true'", "error: it raised None"),
    answers("ready again", "'\"ready\": true'", "error: it raised None"),
    answers("an answer and a goodbye", "'\"end\": true, \"value\": 1'", "failed: an assertion"),
    Hostile("an answer twice", f"{RAW}def f(x):\n    send_raw('\"value\": 42')\n    return 42", "died: broken protocol: an answer to no request", DOUBLE),
    Hostile("a byte after the answer", f"{RAW}def f(x):\n    send_raw('\"value\": 42')\n    os.write(4, b' ')\n    os._exit(0)", GONE, DOUBLE),
    Hostile("leaves after the right answer", f"{RAW}def f(x):\n    send_raw('\"value\": 42')\n    os._exit(0)", GONE, DOUBLE),
    Hostile("answers, and a goodbye with the old id", f"{RAW}def f(x):\n    send_raw('\"value\": 42')\n    send_raw('\"end\": true')\n    os._exit(0)", "died", DOUBLE),
    Hostile("answers, and a goodbye with the old id once it is asked for", f"{RAW}def f(x):\n    send_raw('\"value\": 42')\n    send_raw('\"end\": true')\n    os.read(3, 1)\n    os._exit(0)", "died", DOUBLE),
    Hostile("a byte after the goodbye", f"{RAW}leave = os._exit\ndef more(code):\n    os.write(4, b'x')\n    leave(0)\nos._exit = more\ndef f(x): return 42", "died: it sent more than was requested", DOUBLE),
    Hostile("a frame after the goodbye", f"{RAW}leave = os._exit\ndef more(code):\n    write_all(framed(b'{{}}'))\n    leave(0)\nos._exit = more\ndef f(x): return 42", "died: it sent more than was requested", DOUBLE),
    Hostile("stays after the goodbye", f"{RAW}os._exit = lambda code: time.sleep(99)\ndef f(x): return 42", "timeout", DOUBLE, 0.05),
    Hostile("says no goodbye", f"{RAW}leave = os._exit\ndef f(x):\n    threading.Thread(target=lambda: (time.sleep(0.5), leave(0))).start()\n    frame_of_main().f_globals['send'] = lambda write, m: 'end' in m or send(write, m)\n    return 42\nsend = frame_of_main().f_globals['send']", GONE, DOUBLE),
    Hostile("a thread that answers later", f"{RAW}def later():\n    while True: os.write(4, framed(b'{{\"id\": \"0\", \"value\": 42}}'))\ndef f(x):\n    threading.Thread(target=later, daemon=True).start()\n    time.sleep(0.1)\n    return 42", "died: broken protocol", DOUBLE),
    Hostile("a frame of 4 GiB", f"{RAW}def f(x): os.write(4, b'\\xff' * 8)", "died: broken protocol: a frame of"),
    Hostile("endless answer", f"{RAW}def f(x):\n    while True: os.write(4, b'\\0\\0' * 9999)", "died: broken protocol", GUESS),
    Hostile("an empty frame", f"{RAW}def f(x): os.write(4, b'\\0' * 4)", "died: broken protocol: a frame that is not JSON"),
    Hostile("a frame that is a list", f"{RAW}def f(x): write_all(framed(b'[]'))", "died: broken protocol: a frame that is not a message"),
    Hostile("a frame of brackets", f"{RAW}def f(x): write_all(framed(b'[' * (3 << 20)))", "died: broken protocol: a frame that is not JSON"),
    Hostile("half a frame", f"{RAW}def f(x):\n    os.write(4, b'\\0\\0\\1\\0half')\n    os._exit(0)", GONE),
    Hostile("half a frame, then silence", f"{RAW}def f(x):\n    os.write(4, b'\\0\\0\\1\\0half')\n    time.sleep(99)", "timeout", GUESS, 0.05),
    Hostile("not UTF-8", f"{RAW}def f(x): write_all(framed(b'\\xff\\xfe{{'))", "died: broken protocol: a frame that is not JSON"),
    answers("not a number in JSON", "'\"value\": NaN'", "error: not an encoded literal"),
    answers("a number too long to read", "'\"value\": ' + '9' * 10**6", "died: broken protocol: a frame that is not JSON"),
    answers("an int of 16 million bits", "'\"value\": {\"int\": \"0x' + 'f' * (4 * 10**6) + '\"}'", "failed: an assertion"),
    answers("a power of ten thousand", "'\"value\": {\"float\": \"0x1p99999\"}'", "error: not an encoded literal"),
    answers("a list as a key", "'\"value\": {\"dict\": [[[1], 2]]}'", "error: not an encoded literal"),
    answers("a list in a set", "'\"value\": {\"set\": [[1]]}'", "error: not an encoded literal"),
    answers("keys of one hash", "'\"value\": {\"set\": [%s]}' % ','.join(str(i * (2**61 - 1)) for i in range(90000))", "timeout|error: the test itself", cpu_s=0.05),
    answers("an unknown tag", "'\"value\": {\"eval\": \"1\"}'", "error: not an encoded literal"),
    answers("a tag of a method", "'\"value\": {\"__class__\": []}'", "error: not an encoded literal"),
    answers("two tags", "'\"value\": {\"int\": \"1\", \"set\": []}'", "error: not an encoded literal"),
    answers("a text for a tuple", "'\"value\": {\"tuple\": \"abc\"}'", "error: not an encoded literal"),
    answers("deep tags", "'\"value\": ' + '{\"tuple\": [' * 60 + ']}' * 60", "error: nested too deep"),
    answers("raises a list", "'\"raised\": [[]]'", r"error: it raised \[\[\]\]"),
    answers("raises by a dotted name", "'\"raised\": \"os.system\"'", "error: it raised os.system"),
    answers("raises what is no exception", "'\"raised\": \"print\"'", "error: it raised print"),
    answers("raises our own", "'\"raised\": \"GuestFailed\", \"text\": \"passed\"'", "error: it raised GuestFailed: passed"),
    Hostile("closes the answers", f"{RAW}def f(x):\n    os.close(4)\n    time.sleep(99)", GONE),
    Hostile("closes everything", f"{RAW}def f(x):\n    os.closerange(0, 64)\n    time.sleep(99)", GONE),
    Hostile("closes the requests", f"{RAW}def f(x):\n    os.close(3)\n    return 42", GONE, DOUBLE),
    Hostile("reads no request", f"{RAW}def f(x):\n    send_raw('\"value\": 1')\n    time.sleep(99)", "timeout", "def check(candidate):\n    candidate(1)\n    candidate('x' * (3 << 20))\n", 0.05),
    Hostile("asks itself", f"{RAW}def f(x):\n    try: os.write(os.open('/proc/self/fd/3', os.O_WRONLY), framed(b'{{\"id\": \"0\", \"end\": true}}'))\n    except OSError: send_raw('\"value\": 0')\n    return 42", "died", DOUBLE.replace("== 42", "== 42 or candidate(1)")),
    Hostile("swaps its pipes", f"{RAW}def f(x):\n    a, b = os.pipe()\n    os.dup2(b, 4)\n    return 42", GONE, DOUBLE),
    Hostile("rewrites the function after it was taken", f"{RAW}def f(x):\n    frame_of_main().f_globals['pack'] = lambda v: {{'int': '0x2a'}}\n    return 0", "failed: an assertion"),
]  # fmt: skip

TAMPERS = [
    Hostile("json", "import json\njson.dumps = lambda *_, **__: '{\"status\": \"passed\"}'\ndef f(x): return 1", "died: broken protocol: an answer to no request"),
    Hostile("json's reader", "import json\njson.loads = lambda *_: {'id': '0', 'end': True}\ndef f(x): return 1", "died: broken protocol: an answer to no request"),
    Hostile("os.write", "import os\nw = os.write\nos.write = lambda n, d: (w(n, d), w(n, d))[0]\ndef f(x): return 42", "died: (broken protocol|it sent more)", DOUBLE),
    Hostile("os.read", "import os\nos.read = lambda *_: b''\ndef f(x): return 42", GONE, DOUBLE),
    Hostile("builtins", "import builtins\nfor n in ('len', 'type', 'isinstance', 'abs', 'hex'): setattr(builtins, n, lambda *_: 42)\ndef f(x): return object()", "(died|error)"),
    Hostile("modules", "import sys\nsys.modules.clear()\ndef f(x): return 1", "(failed|died|error)"),
    Hostile("protocol", "import sys\nm = sys.modules['potstill.evals.sandbox.protocol']\nm.pack = m._pack = lambda *_: True\ndef f(x): return object()", "(failed|died|error)"),
    Hostile("everybody's namespace", "import gc\nfor d in gc.get_objects():\n    if type(d) is dict and 'pack' in d: d['pack'] = lambda v: {'value': 1, 'passed': True}\ndef f(x): return 1", "error: not an encoded literal"),
    Hostile("a verdict in the answer", "def f(x): return {'status': 'passed', 'detail': ''}", "failed: an assertion"),
    Hostile("its own check", "def check(candidate): pass\ndef f(x): return 1\nimport sys\nsys.modules['test'] = sys.modules['__main__'] = sys.modules[__name__ if __name__ in sys.modules else 'sys']", "failed: an assertion"),
    Hostile("trace function", "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(x): return 1", "failed: an assertion"),
]  # fmt: skip

MADE = "class E(%s):\n    %s\ndef f(x):\n    raise E\n"
EXCEPTIONS = [
    Hostile("its own kind of BaseException", MADE % ("BaseException", "pass"), "error: it raised BaseException"),
    Hostile("text that never ends", MADE % ("Exception", "def __str__(self):\n        while True: pass"), "timeout", GUESS, 0.05),
    Hostile("text that raises", MADE % ("Exception", "def __str__(self): raise SystemExit"), "error: Exception"),
    Hostile("text that is no text", MADE % ("Exception", "def __str__(self): return 1"), "error: Exception"),
    Hostile("text of 100 MB", MADE % ("Exception", "def __str__(self): return 'x' * 10**8"), "error: Exception: x"),
    Hostile("a class in our module", "class E(Exception):\n    pass\nE.__module__, E.__name__ = 'builtins', 'GuestFailed'\ndef f(x): raise E('passed')", "error: it raised GuestFailed"),
    Hostile("a class that hides its bases", "class M(type):\n    __mro__ = property(lambda c: (c, int))\nclass E(Exception, metaclass=M): pass\ndef f(x): raise E", "(error|died)"),
    calls("an assertion of its own", "raise AssertionError('passed')", "failed: passed"),
    calls("an assertion with control characters", "raise AssertionError('\\x1b[2J\\x9b\\u202epassed\\r\\n' + chr(0xd800))", r"failed: \\x1b\[2J\\x9b\\u202epassed\\r\\n\\ud800"),
    calls("stops an iteration", "raise StopIteration", "(error|failed)", "def check(candidate):\n    assert TOKEN in [candidate(i) for i in range(3)]\n"),
    calls("stops a generator", "raise StopIteration", "error: RuntimeError", "def check(candidate):\n    assert all(candidate(i) for i in range(3))\n"),
    calls("a group", "raise ExceptionGroup('passed', [ValueError()])", "error: CandidateError: ExceptionGroup"),
    calls("an exception of five arguments", "b'\\xff'.decode()", "error: CandidateError: UnicodeDecodeError"),
    calls("a test that catches everything", "os._exit(0)", GONE, "def check(candidate):\n    try:\n        candidate(21)\n    except:\n        return\n"),
    calls("a test that catches everything, and a lie", "return object()", "error: it answered", "def check(candidate):\n    try:\n        candidate(21)\n    except BaseException:\n        pass\n    finally:\n        return\n"),
    calls("memory, caught by the test", "return object()", "error: it answered", "def check(candidate):\n    for i in range(3):\n        try: candidate(i)\n        except: continue\n"),
]  # fmt: skip

RESOURCES = [
    calls("endless loop", "while True: pass", "timeout", cpu_s=0.25),
    Hostile("endless loop at import", "while True: pass", "timeout", cpu_s=0.05),
    calls("endless loop that catches all", "while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timeout", cpu_s=0.05),
    calls("ignores every signal", "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass", "timeout", cpu_s=0.05),
    calls("sleeps for ever", "import time\ntime.sleep(1e6)", "timeout", cpu_s=0.05),
    calls("waits for a signal", "import signal\nsignal.pause()", "timeout", cpu_s=0.05),
    calls("deadlock", "import threading\na = threading.Lock()\na.acquire()\na.acquire()", "timeout", cpu_s=0.05),
    calls("waits for input", "return input()", "error: EOFError"),
    calls("endless print", "while True: print('x' * 10**6)", "timeout", cpu_s=0.05),
    calls("one call that never returns", "return 7 ** 10 ** 9", "timeout", cpu_s=0.05),
    calls("a regular expression", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "timeout", cpu_s=0.05),
    calls("time in threads", "import threading, hashlib\nfor _ in range(8): threading.Thread(target=hashlib.pbkdf2_hmac, args=('sha256', b'', b'', 10**8)).start()\nhashlib.pbkdf2_hmac('sha256', b'', b'', 10**8)", "timeout", cpu_s=0.05),
    calls("an alarm", "import signal\nsignal.alarm(1)\nimport time\ntime.sleep(9)", "died"),
    calls("recursion", "return f(x)", "error: RecursionError"),
    calls("recursion without a limit", "sys.setrecursionlimit(10**9)\ng = lambda n: [g(n)]\nimport threading\nreturn g(1)", "(died|error|timeout)", cpu_s=0.05),
    calls("a list of 10 GB", "return len([0] * (10 * 2**30 // 8))", "error: MemoryError"),
    calls("memory bit by bit", "a = []\nwhile True: a.append(bytearray(1 << 24))", "error: MemoryError", cpu_s=20.0),
    calls("memory from the kernel", "import mmap\nreturn mmap.mmap(-1, 8 << 30)", "error: OSError"),
    calls("more memory by another limit", "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "error: (ValueError|PermissionError|OSError)"),
    calls("threads without end", "import threading, time\nthreading.stack_size(65536)\ntry:\n    for n in range(5000): threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\nexcept RuntimeError: return f'refused after {n}'", r"error: ValueError: refused after \d", TOLD),
    calls("descriptors without end", "try:\n    for n in range(5000): os.pipe()\nexcept OSError: return f'refused after {n}'", r"error: ValueError: refused after [123]\d$", TOLD),
    calls("a large answer to a small test", "return 10**7", "error: MemoryError", "def check(candidate):\n    x = [0] * (candidate(21) * 10**3)\n"),
    calls("keeps the test busy", "return 10**9", "timeout|error: the test itself", "def check(candidate):\n    for _ in range(candidate(21) * 99): pass\n", 0.05),
    calls("makes the test exit", "return 1", "error: the test itself", "def check(candidate):\n    raise SystemExit(candidate(21))\n"),
]  # fmt: skip

PROGRAMS = [*EXITS, *LIES, *WALKS, *PROTOCOL, *TAMPERS, *EXCEPTIONS, *RESOURCES]
