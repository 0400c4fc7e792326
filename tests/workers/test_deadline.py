"""Functions that are called with a deadline."""

import threading

from posttrain.workers.deadline import call_with_deadline


def loops():
    while True:
        pass


def test_an_endless_loop_does_not_go_on_after_its_deadline():
    running = []

    def loops_in_a_known_thread():
        running.append(threading.current_thread())
        loops()

    assert call_with_deadline(loops_in_a_known_thread, timeout_seconds=0.05)[1].is_timeout
    running[0].join(5)
    assert not running[0].is_alive()
