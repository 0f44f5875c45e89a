"""What is waited for so long and no longer, and what is waited for whatever happens."""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

Answer = TypeVar("Answer")


#: Between two looks at what else may end the wait.
_LOOK_SECONDS = 0.2


_SOON_SECONDS = 0.001


def wait_for_end(is_over: Callable[[], bool]) -> None:
    """Wait until other threads use nothing any more of what is closed next, though Ctrl-C is pressed meanwhile.

    Whoever closes their files too early has them write to what gets the same descriptor. `Thread.join` does not do:
    once Ctrl-C has ended it, Python up to 3.12 takes the thread for ended.

    Raises:
        KeyboardInterrupt: when it is over, if it was pressed.
    """
    pressed: KeyboardInterrupt | None = None
    while True:
        try:
            while not is_over():
                time.sleep(_SOON_SECONDS)
            break
        except KeyboardInterrupt as error:
            pressed = error
    if pressed is not None:
        raise pressed


def call_with_timeout(seconds: float, ask: Callable[[], Answer], look: Callable[[], object] = lambda: None) -> Answer:
    """What a question is answered, or the error that it raises; its thread does not keep Python from ending.

    `look` is called several times a second meanwhile: what it raises ends the wait. For calls that have no limit of
    their own: most requests of huggingface_hub, and calls to torch's store behind a network that is cut.

    Raises:
        TimeoutError: there is no answer in so many seconds.
    """
    outcome = Future[Answer]()

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
