"""What others wrote ends, in whatever thread it runs."""

import concurrent.futures
import re
import threading
import time

import pytest

from prefalign_jax.limits import check_pattern, time_limit


def elsewhere(function, *arguments):
    """What a function gives in another thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result(20)


def here(function, *arguments):
    return function(*arguments)


def busy(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def stopped():
    """As a process that was stopped, or got no processor, for longer than the limit."""
    with time_limit(0.05):
        time.sleep(0.2)
        return "done"


@pytest.mark.parametrize("where", [here, elsewhere])
def test_time_in_which_nothing_ran_does_not_count(where):
    assert where(stopped) == "done"


def endless():
    with time_limit(0.1):
        while True:
            pass


@pytest.mark.parametrize("where", [here, elsewhere])
def test_what_has_no_end_ends(where):
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"it takes more than 0\.1 seconds"):
        where(endless)
    assert time.monotonic() - began < 5


def several():
    with time_limit(30):
        value = sum(range(1000))
    with pytest.raises(KeyError), time_limit(30):
        raise KeyError
    with pytest.raises(TimeoutError, match="one's own"), time_limit(30):
        raise TimeoutError("one's own")
    for _ in range(50):  # that end at about their limit: the exception comes within or not at all
        try:
            with time_limit(0.002):
                busy(0.002)
        except TimeoutError:
            pass
        time.sleep(0.0005)
    return value


@pytest.mark.parametrize("where", [here, elsewhere])
def test_what_ends_is_left_alone(where):
    threads = threading.active_count()
    assert where(several) == 499500
    time.sleep(0.05)
    assert threading.active_count() <= threads


def many():
    with time_limit(0.2) as start_anew:
        for _ in range(6):
            start_anew()
            busy(0.1)
        start_anew()
        with time_limit(30):  # the clock of the outer one stands still, or at least goes on afterwards
            pass
        while True:
            pass


@pytest.mark.parametrize("where", [here, elsewhere])
def test_the_clock_starts_anew_for_each_of_many(where):
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"it takes more than 0\.2 seconds"):
        where(many)
    assert 0.6 < time.monotonic() - began < 5


HARMLESS = ["q_proj", r"^model\.layers\.(0|1)\.self_attn\.(q_proj|v_proj)$", r"layers\.\d+", ".*q_proj"]
HOSTILE = ["(.*)*$z", r"(.|\w)(\w|.)" * 13 + "$z", "a?" * 30 + "a" * 30, "(a|a)*", "(a{1,9}){1,9}"]


def test_a_pattern_that_nothing_could_end_is_not_begun_outside_the_main_thread():
    for pattern in HARMLESS + HOSTILE:
        check_pattern(pattern)  # the main thread's signals end it
    for pattern in HARMLESS:
        elsewhere(check_pattern, pattern)
        re.compile(pattern)
    for pattern in HOSTILE:
        with pytest.raises(TimeoutError, match="only the main thread can end"):
            elsewhere(check_pattern, pattern)
