"""Records in shards: none lost, none torn, whatever happens to the processes that write them."""

import copy
import os
import random
import resource
import shutil
import signal
import time
from hashlib import blake2b
from pathlib import Path

import pytest

import distill.storage.shards
from distill.errors import DistillError
from distill.storage.shards import _ENTRY, _HEADER, KEY, Shards


def key(number: int) -> bytes:
    return blake2b(str(number).encode(), digest_size=KEY).digest()


def content(number: int) -> bytes:
    """Bytes of 0 to about 900, among them those that begin a record."""
    draw = random.Random(number)
    return b"\x89rec" * (number % 3) + draw.randbytes(draw.randrange(900))


def fill(shards: Shards, numbers) -> None:
    for number in numbers:
        shards.put({key(number): content(number)})


def found(shards: Shards, numbers) -> list[int]:
    return [number for number in numbers if (value := shards.get(key(number))) is not None and value == content(number)]


def files(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.suffix != ".lock")


def test_what_is_put_is_found_also_later_and_the_last_record_of_a_key_counts(tmp_path):
    shards = Shards(tmp_path, "a")
    assert shards.get(key(0)) is None
    shards.put({key(number): content(number) for number in range(40)})
    shards.put({key(3): b"new"})
    for each in (shards, Shards(tmp_path, "a"), copy.deepcopy(shards)):
        assert len(each) == 40
        assert each.get(key(3)) == b"new"
        assert found(each, range(40)) == [number for number in range(40) if number != 3]
    assert Shards(tmp_path, "other").get(key(3)) is None
    assert files(tmp_path) == ["a-0000.index", "a-0000.shard"]


@pytest.mark.parametrize("lost", ["both", pytest.param("index", marks=pytest.mark.full), "shard"])
def test_cut_off_at_any_byte_the_whole_records_are_left_and_more_is_put_behind_them(tmp_path, lost):
    numbers, source = range(1, 5), tmp_path / "source"
    source.mkdir()
    fill(Shards(source, "a"), numbers)
    ends = [0]
    for number in numbers:
        ends.append(ends[-1] + _HEADER.size + len(content(number)))
    entries = [_ENTRY.size * count for count in range(len(numbers) + 1)]
    step = 11 if lost == "shard" else 97
    for cut in sorted(
        {*range(0, ends[-1], step), *ends, *(end + 1 for end in ends[:-1]), *(end - 1 for end in ends[1:])}
    ):
        folder = tmp_path / f"{lost}-{cut}"
        shutil.copytree(source, folder)
        whole = sum(end <= cut for end in ends[1:])
        if lost != "index":
            os.truncate(folder / "a-0000.shard", cut)
        if lost != "shard":
            os.truncate(folder / "a-0000.index", min(entries[-1], max(0, entries[whole] - 5)))
        left = list(numbers) if lost == "index" else list(numbers)[:whole]
        assert found(Shards(folder, "a"), numbers) == left
        fill(Shards(folder, "a"), [7, 8])
        again = Shards(folder, "a")
        assert found(again, [*numbers, 7, 8]) == [*left, 7, 8]
        assert len(again) == len(left) + 2
        assert (folder / "a-0000.index").stat().st_size == _ENTRY.size * len(again)


def test_two_writers_have_a_shard_each_and_see_what_the_other_puts(tmp_path):
    one, two = Shards(tmp_path, "a"), Shards(tmp_path, "a")
    fill(one, [1])
    fill(two, [2])
    fill(one, [3])
    assert found(one, range(4)) == found(two, range(4)) == [1, 2, 3]
    assert files(tmp_path) == ["a-0000.index", "a-0000.shard", "a-0001.index", "a-0001.shard"]
    del one, two
    fill(Shards(tmp_path, "a"), [4])  # the first is free again
    assert len(files(tmp_path)) == 4


def test_a_full_shard_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(distill.storage.shards, "FULL", 2000)
    shards = Shards(tmp_path, "a")
    fill(shards, range(20))
    assert len(list(tmp_path.glob("*.shard"))) > 2
    assert max(each.stat().st_size for each in tmp_path.glob("*.shard")) < 3000
    assert found(Shards(tmp_path, "a"), range(20)) == found(shards, range(20)) == list(range(20))


@pytest.mark.parametrize("damage", ["content", "header", "index", "no index"])
def test_damage_costs_the_record_that_it_hits_and_no_other(tmp_path, damage):
    fill(Shards(tmp_path, "a"), range(1, 6))
    shard, index = tmp_path / "a-0000.shard", tmp_path / "a-0000.index"
    place = sum(_HEADER.size + len(content(number)) for number in (1, 2))  # where record 3 begins

    def flip(file: Path, at: int) -> None:
        whole = bytearray(file.read_bytes())
        whole[at] ^= 255
        file.write_bytes(whole)

    if damage == "no index":
        index.unlink()
    elif damage == "index":
        flip(index, 2 * _ENTRY.size + 10)
    else:
        index.unlink() if damage == "header" else None
        flip(shard, place + (_HEADER.size + 3 if damage == "content" else 9))
    shards = Shards(tmp_path, "a")
    left = [1, 2, 4, 5] if damage in ("content", "header") else [1, 2, 3, 4, 5]
    if damage == "content":
        with pytest.raises(LookupError, match=r"a-0000\.shard is damaged at byte"):
            shards.get(key(3))
    assert found(shards, range(6)) == left
    fill(shards, [3])
    assert found(Shards(tmp_path, "a"), range(6)) == [1, 2, 3, 4, 5]


def in_a_fork(function) -> int:
    """Return the process in which a function runs, and nothing after it."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)


@pytest.mark.parametrize("rounds", [6, pytest.param(20, marks=pytest.mark.full)])
def test_processes_that_write_at_once_and_are_killed_at_any_moment_lose_nothing(tmp_path, rounds):
    """Each says that a record is kept after it was put; all that were said are there, from whichever process."""
    draw, said, at = random.Random(0), set[int](), 0
    for _ in range(rounds):
        reading, writing = os.pipe()

        def write(first: int, out: int = writing) -> None:
            shards = Shards(tmp_path, "a")
            for number in range(first, first + 100_000, 4):
                shards.put({key(each): content(each) for each in range(number, number + 4)})
                os.write(out, b"".join(each.to_bytes(8, "little") for each in range(number, number + 4)))

        children = [in_a_fork(lambda first=at + 100_000 * which: write(first)) for which in range(2)]
        os.close(writing)
        at += 200_000
        read = os.read(reading, 64)
        time.sleep(draw.uniform(0, 0.03))
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        while more := os.read(reading, 2**20):
            read += more
        os.close(reading)
        said |= {int.from_bytes(read[place : place + 8], "little") for place in range(0, len(read) - 7, 8)}
    shards = Shards(tmp_path, "a")
    assert len(said) > 8 * rounds
    assert found(shards, sorted(said)) == sorted(said)
    assert len(said) <= len(shards) <= len(said) + 2 * 4 * rounds
    assert len(list(tmp_path.glob("*.shard"))) == 2


def test_a_fork_of_a_writer_writes_a_shard_of_its_own(tmp_path):
    shards = Shards(tmp_path, "a")
    fill(shards, [1])
    _, status = os.waitpid(in_a_fork(lambda: fill(shards, [2])), 0)
    assert status == 0
    fill(shards, [3])
    assert found(shards, range(5)) == [1, 2, 3]
    assert len(list(tmp_path.glob("*.shard"))) == 2


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path):
    def write() -> None:
        shards = Shards(tmp_path, "a")
        fill(shards, range(5))
        room = (tmp_path / "a-0000.shard").stat().st_size + 100
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        with pytest.raises(
            DistillError, match=r"a-0000\.shard cannot be written \(File too large\); all that was kept"
        ):
            shards.put({key(9): bytes(500)})
        assert found(shards, range(5)) == list(range(5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        fill(shards, [6])

    _, status = os.waitpid(in_a_fork(write), 0)
    assert status == 0
    assert found(Shards(tmp_path, "a"), range(10)) == [0, 1, 2, 3, 4, 6]
