"""A `python` for shell files whose commands are forks of a process that has the scripts imported: they begin in
milliseconds, so that a file of forty commands can be killed often.

`serve` is that process. `python` in its folder connects to its socket, hands over arguments and streams, and waits for
the exit code; the command joins its process group, and ends with it.
"""

import json
import os
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path

CLIENT = """#!{python} -ISs
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = {{"argv": sys.argv[1:], "folder": os.getcwd(), "group": os.getpgrp()}}
socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or 137))  # of a command that was killed
"""


def write_client(folder: Path) -> str:
    """Write `python` into a folder; returns the address of its server's socket."""
    folder.mkdir(parents=True, exist_ok=True)
    address, client = str(folder / "socket"), folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    return address


def serve(address: str) -> None:
    """Answer for ever, each command in a process of its own."""
    Path(address).unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what was forked
    while True:
        client, _ = server.accept()
        if os.fork() == 0:
            server.close()
            run(client)
        client.close()


def run(client: socket.socket) -> None:
    """One command, to its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, streams, _, _ = socket.recv_fds(client, 2**16, 3)
    request = json.loads(text)
    try:
        os.setpgid(0, request["group"])
    except (ProcessLookupError, PermissionError):  # killed by now
        os._exit(1)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    threading.Thread(target=end_with, args=(client,), daemon=True).start()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(request["folder"])
    code = 0
    try:
        command(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    client.sendall(str(code).encode())
    os._exit(code)


def end_with(client: socket.socket) -> None:
    """End this process when its client is killed."""
    if client.recv(1, socket.MSG_PEEK) == b"":
        os.kill(os.getpid(), signal.SIGKILL)


def command(argv: list[str]) -> None:
    """What `python ARGUMENT...` does, of -c and of scripts."""
    import torch
    from scripts import MAINS

    torch.set_num_threads(1)
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(argv[1], {"__name__": "__main__"})
    elif argv[0] in MAINS:
        sys.argv = argv
        MAINS[argv[0]](argv[1:])
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
