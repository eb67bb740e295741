"""What a sandbox must prevent: `Sandbox` tries each of these function bodies before it is used, and rejects a
tier in which one succeeds. Data only.
"""

from __future__ import annotations


def _refused(action: str) -> str:
    return f"""try:
    {action}
    return 'done'
except (OSError, MemoryError) as error:
    return f'refused: {{error!r}}'"""


OPEN_FILES = """import os
found = []
for number in range(64):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
return f'{found}'"""
EQUAL_TO_ALL = """class Equal(int):
    __eq__ = lambda *_: True
return Equal()"""
PROBES = [
    ("network", "import socket\n" + _refused("socket.socket()"), "refused"),
    ("writing a file", _refused("open('/canary', 'w')"), "refused"),
    ("reading a file", _refused("open('/etc/passwd').read()"), "refused"),
    ("starting a process", "import os\n" + _refused("os.fork() or os._exit(0)"), "refused"),
    ("running a program", "import os\n" + _refused("os.execv('/bin/true', ['true'])"), "refused"),
    ("signalling another", "import os\n" + _refused("os.kill(os.getppid(), 0)"), "refused"),
    ("memory", _refused("bytearray(8 << 30)"), "refused"),
    ("environment", "import os\nreturn f'{sorted(os.environ)}'", "[]"),
    ("descriptors", OPEN_FILES, "[0, 1, 2, 3, 4]"),
    ("early exit", "import os\nos._exit(0)", "died"),
    ("an answer that equals all", EQUAL_TO_ALL, "not a plain literal"),
]
"""Name, function body, and a text that the outcome must contain."""
