"""Jupyter kernels that are there at once: forks of one process that has imported what the notebooks import.

`warm_kernels` is a fixture of whoever runs notebooks. For Jupyter a kernel is this file as a program (python
warm_kernel.py SOCKET -f CONNECTION), which asks that process for a fork, hands on what it is asked to do, and ends with
it.
"""
import json
import os
import signal
import socket
import sys
import threading


def kernel(path: str, *words: str) -> None:
    """What Jupyter starts: a fork's stand-in, which gives it its folder, environment and output, and its interrupts."""
    asked = socket.socket(socket.AF_UNIX)
    asked.connect(path)
    told = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    socket.send_fds(asked, [len(told).to_bytes(4, "big")], [0, 1, 2])
    asked.sendall(told)
    signal.signal(signal.SIGINT, lambda *_: asked.sendall(b"i"))
    asked.recv(1)                                               # nothing ever comes: its end is the end


def obey(asked: socket.socket) -> None:
    """In a fork, beside its kernel: interrupts, and the end of the stand-in, which is its own."""
    while asked.recv(1):
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(1)


def serve(path: str) -> None:
    """Import what the first code cell of each notebook imports; then fork for everyone who asks, and run a kernel
    there."""
    from vitlab.workbench.notebooks import NOTEBOOKS, code_of
    os.environ |= {"JPY_PARENT_PID": str(os.getpid()), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    from ipykernel import kernelapp
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        exec(code_of(notebook)[0], {})
    server = socket.socket(socket.AF_UNIX)
    server.bind(path + ".new")
    server.listen()
    os.rename(path + ".new", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)               # nobody asks how they ended
    while True:
        asked, _ = server.accept()
        if os.fork() == 0:
            break
        asked.close()
    server.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(asked, 4, 3)
    told = json.loads(asked.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ |= told["environment"] | {"JPY_PARENT_PID": str(os.getppid())}
    threading.Thread(target=obey, args=(asked,), daemon=True).start()
    sys.argv = ["ipykernel_launcher.py", *told["words"]]
    kernelapp.launch_new_instance()


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "serve" else kernel(*sys.argv[1:])
else:
    import subprocess
    import tempfile
    import time
    from pathlib import Path

    import pytest

    @pytest.fixture(scope="module")
    def warm_kernels():
        """Whatever starts a kernel of Jupyter's gets a fork."""
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            place = Path(folder) / "socket"
            server = subprocess.Popen([sys.executable, __file__, "serve", str(place)], cwd=Path(__file__).parents[1],
                                      env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
            spec = Path(folder) / "kernels" / "python3" / "kernel.json"
            spec.parent.mkdir(parents=True)
            spec.write_text(json.dumps({"display_name": "Python 3 (ipykernel)", "language": "python",
                                        "metadata": {"debugger": True}, "argv": [
                                            sys.executable, "-S", __file__, str(place), "-f", "{connection_file}"]}))
            patch.setenv("JUPYTER_PATH", folder)
            while not place.exists():
                assert server.poll() is None
                time.sleep(0.1)
            yield
            server.terminate()
            server.wait()
