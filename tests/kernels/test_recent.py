"""Specification of what is kept for sizes: the last ones are found, the others are forgotten, threads do no harm."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_pqcad.kernels.x86.recent import Recent

pytestmark = pytest.mark.fast


@given(limit=st.integers(1, 4), uses=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_the_last_keys_are_found_and_no_more_than_twice_as_many_are_kept(
    limit: int, uses: list[tuple[int, bool]]
) -> None:
    """A use sets a key, to the number of the use, or asks for it."""
    recent, latest, last = Recent(limit), {}, []
    for number, (key, sets) in enumerate(uses, start=1):
        if sets:
            recent[key] = latest[key] = number
        found = recent.get(key)
        assert found in (None, latest.get(key))
        assert key not in last[:limit] or found == latest[key]
        if found is not None:
            last = [key, *(other for other in last if other != key)]
        assert len(recent) <= 2 * limit
    assert all(recent.get(key) == latest[key] for key in reversed(last[:limit]))


def test_threads_may_use_it_at_once() -> None:
    recent, num_threads = Recent(8), 8

    def use(thread: int) -> bool:
        found = []
        for number in range(20_000):
            key = (number * (thread + 1)) % 40
            found.append(recent.get(key) in (None, str(key)))
            recent[key] = str(key)
        return all(found)

    with ThreadPoolExecutor(num_threads) as pool:
        assert all(pool.map(use, range(num_threads)))
    assert len(recent) <= 2 * (8 + num_threads)
