"""What is kept for sizes of inputs: that of the sizes that were used last, however many a server sees."""

from typing import Any

KEPT_SIZES = 32  # of a layer or block, at least; to make anew what is kept for one takes a fraction of a millisecond


class Recent:
    """A mapping of the keys that were used last: at least `limit`, at most twice as many. No value is `None`.

    New keys, and old ones that are used, come to the young half. When that is full, it becomes the old half, and what
    was that is forgotten: a look-up costs what one in a dictionary does. Threads may use it at once, and fork, as none
    waits for a lock; at worst they forget too much. What is forgotten while it is in use lives until then.
    """

    def __init__(self, limit: int = KEPT_SIZES) -> None:
        self.limit = limit
        self._young: dict[Any, Any] = {}
        self._old: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len({**self._old, **self._young})

    def get(self, key: Any) -> Any:
        """Return the value of `key`, which is the last one used now, or `None`."""
        value = self._young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self[key] = value
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self._young) >= self.limit and key not in self._young:
            self._old, self._young = self._young, {}
        self._young[key] = value
