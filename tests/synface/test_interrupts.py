"""Ctrl-C waits for the end of a step."""

import os
import signal
import threading

import pytest
from synface.interrupts import interrupts


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_one_is_told_and_the_second_one_raises():
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as pressed:
        assert not pressed()
        press()
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_is_never_told():
    before, told = signal.getsignal(signal.SIGINT), []

    def look():
        with interrupts() as pressed:
            told.extend([pressed(), signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert told == [False, True]
