"""An answer that is waited for so long and no longer."""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

Answer = TypeVar("Answer")


#: Between two looks at what else may end the wait.
_LOOK_SECONDS = 0.2


def call_with_timeout(seconds: float, ask: Callable[[], Answer], look: Callable[[], object] = lambda: None) -> Answer:
    """What a question is answered, or the error that it raises; its thread does not keep Python from ending.

    `look` is called several times a second meanwhile: what it raises ends the wait.

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
    deadline = time.monotonic() + seconds
    while not wait([outcome], timeout=min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic()))).done:
        look()
        if time.monotonic() >= deadline:
            raise TimeoutError(f"no answer in {seconds:g} s")
    return outcome.result()
