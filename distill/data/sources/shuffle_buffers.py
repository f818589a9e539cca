"""Shuffle buffers of `datasets` whose rows are a part of the state of the stream.

The state of `IterableDataset.shuffle(buffer_size=…)` holds where its source stands but not the rows in the buffer,
which a resumed run would lose. Here the same rows come in the same order, and the state holds the buffer too.
"""

from collections.abc import Iterator
from copy import copy, deepcopy
from functools import cache
from typing import Any

BUFFER = "BufferShuffledExamplesIterable"
"""The class of `datasets` that shuffles in a buffer."""


def is_iterable_of_hugging_face(data: Any) -> bool:
    """Return whether data is an iterable data set of Hugging Face with a state."""
    return all(hasattr(data, name) for name in ("_ex_iterable", "_starting_state_dict", "state_dict", "set_epoch"))


def with_kept_buffers(data: Any) -> Any:
    """Return a copy of an iterable data set of Hugging Face, whose state holds the rows in its shuffle buffers.

    The copy has an epoch and a state of its own, so that those of the original stay.
    """
    found = object.__new__(type(data))
    found.__dict__.update(data.__dict__)  # not copy(data), which would share the attributes
    found._epoch = deepcopy(data._epoch)
    found._ex_iterable = _kept(data._ex_iterable)
    return found


class Held(tuple[Any, ...]):
    """The rows of a buffer, which are not changed, so that a copy of a state need not copy them."""

    def __deepcopy__(self, memo: Any) -> "Held":
        return self


def plain(state: Any) -> Any:
    """Return a state with the rows of buffers as plain lists."""
    if isinstance(state, dict):
        return {name: plain(each) for name, each in state.items()}
    return [plain(each) for each in state] if isinstance(state, list | Held) else state


def _kept(source: Any) -> Any:
    """Return a source of rows, and all that it reads from, with buffers that are a part of the state."""
    found = copy(source)
    if hasattr(found, "ex_iterable"):
        found.ex_iterable = _kept(found.ex_iterable)
    if hasattr(found, "ex_iterables"):
        found.ex_iterables = [_kept(each) for each in found.ex_iterables]
    if type(found).__name__ != BUFFER:
        return found
    return _kept_buffer()(found.ex_iterable, buffer_size=found.buffer_size, generator=found.generator)


@cache
def _kept_buffer() -> Any:
    """Return the class of buffers that are a part of the state, made here since `datasets` is imported late."""
    from datasets.iterable_dataset import BufferShuffledExamplesIterable

    class KeptBuffer(BufferShuffledExamplesIterable):
        """A shuffle buffer: once it is full it is shuffled, and one half of it is yielded."""

        def _init_state_dict(self) -> dict[str, Any]:
            source = self.ex_iterable._init_state_dict()
            # None, not a list: a list would be filled element by element when a state is loaded.
            self._state_dict = {"examples_iterable": source, "buffer": None, "until": 0, "next": 0, "draws": None,
                                "type": "KeptBuffer"}  # fmt: skip
            return self._state_dict

        def load_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            return super(BufferShuffledExamplesIterable, self).load_state_dict(state_dict)

        @property
        def iter_arrow(self) -> None:
            return None

        def __iter__(self) -> Iterator[Any]:
            state, draws = self._state_dict or {}, deepcopy(self.generator)
            held: list[Any] = []
            if state.get("buffer") is not None:
                draws.bit_generator.state = state["draws"]
                state["buffer"] = Held(map(tuple, state["buffer"]))
                yield from _given_out(state)
                held = list(state["buffer"][state["until"] :])
            for row in self.ex_iterable:
                held.append(row)
                if len(held) >= self.buffer_size:
                    until = len(held) - self.buffer_size // 2
                    _shuffle(state, held, draws, until)
                    yield from _given_out(state)
                    held = list(state["buffer"][until:])
            if held:
                _shuffle(state, held, draws, len(held))
                yield from _given_out(state)

        def shift_rngs(self, value: int) -> Any:
            return self._as_kept(super().shift_rngs(value))

        def shuffle_data_sources(self, generator: Any) -> Any:
            return self._as_kept(super().shuffle_data_sources(generator))

        def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> Any:
            return self._as_kept(super().shard_data_sources(num_shards, index, contiguous=contiguous))

        def reshard_data_sources(self) -> Any:
            return self._as_kept(super().reshard_data_sources())

        def _as_kept(self, made: Any) -> Any:
            return KeptBuffer(made.ex_iterable, buffer_size=made.buffer_size, generator=made.generator)

    return KeptBuffer


def _shuffle(state: dict[str, Any], held: list[Any], draws: Any, until: int) -> None:
    """Shuffle the rows of a buffer into its state; the first `until` of them are to be yielded."""
    state["buffer"] = Held(held[place] for place in draws.permutation(len(held)))
    state["draws"], state["until"], state["next"] = deepcopy(draws.bit_generator.state), until, 0


def _given_out(state: dict[str, Any]) -> Iterator[Any]:
    """Yield the rows of a buffer that are left to be yielded."""
    while state["next"] < state["until"]:
        state["next"] += 1
        yield state["buffer"][state["next"] - 1]
