"""An answer that is waited for so long and no longer."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

Answer = TypeVar("Answer")


def call_with_timeout(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """What a question is answered, or the error that it raises; its thread does not keep Python from ending.

    For calls that have no limit of their own: most requests of huggingface_hub (`timeout=None` in its
    `utils/_http.py`), and calls to torch's store behind a network that is cut.

    Raises:
        TimeoutError: there is no answer in so many seconds.
    """
    outcome: Future[Answer] = Future()

    def work() -> None:
        try:
            outcome.set_result(ask())
        except BaseException as error:  # raised where it is waited for
            outcome.set_exception(error)

    Thread(target=work, daemon=True).start()
    if not wait([outcome], timeout=seconds).done:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return outcome.result()
