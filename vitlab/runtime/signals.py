"""A request to stop (SIGTERM, from a queue that wants its machine back, or from the runs panel) ends a command with an
exit code of its own: nothing is lost, and the same command goes on."""
import contextlib
import signal
import threading
from collections.abc import Callable, Generator

EXIT_CODE = 75                                  # EX_TEMPFAIL of sysexits.h: not done, to be tried again


class Stopped(BaseException):
    """The process was asked to stop, and what it had is on the disk."""


@contextlib.contextmanager
def on_request(answer: Callable[[], None]) -> Generator[None]:
    """Inside, a request to stop calls `answer`. Only the main thread is told of one; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: answer())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop() -> None:
    """The answer of work that loses nothing wherever it ends."""
    raise Stopped
