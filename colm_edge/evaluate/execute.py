"""Run code that a model wrote, in a child process that is limited as far as the system allows.

This guards against accidents: endless loops, runaway memory, files and sockets. It is not a jail
for code that was written to break out; run untrusted models in a virtual machine or a container.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from secrets import randbelow

SECONDS = 10  # of processor time, and of waiting
MEMORY_BYTES = 1 << 30
# Runs first in the child. Audit hooks see what the interpreter does and cannot be taken off again.
GUARD = f"""
import sys
try:
    import resource
    for what, most in (
        (resource.RLIMIT_CPU, {SECONDS}),
        (resource.RLIMIT_AS, {MEMORY_BYTES}),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
except ImportError:  # Windows: the time limit is left
    pass
REFUSED = tuple('''
    socket. subprocess. os.system os.exec os.fork os.spawn os.posix_spawn os.remove os.rename
    os.rmdir os.mkdir os.link os.symlink os.truncate os.chmod os.chown os.kill shutil. ctypes.
    pty. urllib. ftplib. smtplib. http. sqlite3. winreg. webbrowser.
'''.split())
import os
def refused(*args, **more):
    raise PermissionError("that is not allowed here")
for module, name in (  # these raise no event
    ("_posixsubprocess", "fork_exec"), ("posix", "mkfifo"), ("posix", "mknod"),
    ("os", "mkfifo"), ("os", "mknod"),
):
    try:
        setattr(__import__(module), name, refused)
    except ImportError:  # Windows
        pass
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LIBRARY = tuple(os.path.join(os.path.realpath(path), "") for path in (sys.prefix, sys.base_prefix))
def guard(event, args):
    if event.startswith(REFUSED):
        raise PermissionError(event + " is not allowed here")
    if event == "open":
        path, writes = str(args[0]), isinstance(args[2], int) and args[2] & WRITES
        if writes or not os.path.realpath(path).startswith(LIBRARY):
            raise PermissionError("only Python's own files may be read here")
import types
status, code = sys.stdin.read().split("\\n", 1)
module = sys.modules["answer"] = types.ModuleType("answer")  # where dataclasses look for it
sys.stdin = None
sys.addaudithook(guard)
exec(compile(code, "answer", "exec"), module.__dict__)
os._exit(int(status))
"""


def passes(code: str) -> bool:
    """Return whether the code runs to its end: no exception, no limit met, no exit of its own."""
    # Code that ends itself does not guess the status that stands for its end.
    status = 64 + randbelow(64)
    # `python -I` reads no environment and no site of the user's; the folder is empty.
    with tempfile.TemporaryDirectory() as folder:
        try:
            child = subprocess.run(
                [sys.executable, "-I", "-X", "utf8", "-c", GUARD],
                cwd=folder,
                env={},
                input=f"{status}\n{code}".encode("utf-8", "replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return child.returncode == status
