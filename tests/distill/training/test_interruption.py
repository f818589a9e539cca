"""Signals take effect between two steps, and are those of the caller afterwards."""

import os
import signal
import threading

import pytest

from distill.training.interruption import SIGNALS, Interrupt, defer_interrupt, delay_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_a_second_one_interrupts(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with defer_interrupt() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), number)
        assert asked.wait(5)
        assert asked.stops
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with defer_interrupt() as asked:
            seen.append((asked.is_set(), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_block_is_handled_at_its_end(number):
    with defer_interrupt() as asked:
        with delay_signals():
            signal.raise_signal(number)
            assert not asked.is_set()
        assert asked.is_set()


def test_a_process_among_several_stops_by_what_all_agreed_on():
    interrupt = Interrupt()
    interrupt.set()
    assert interrupt.stops
    interrupt.agreed = False
    assert not interrupt.stops
