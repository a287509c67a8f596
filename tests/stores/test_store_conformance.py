"""What every store does. A new store's test is a subclass that gives one fixture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from holoray.errors import CapacityError, LimitError, SourceError, UsageError
from holoray.stores import LocalStore, MemoryStore, Store


class StoreTests:
    """Subclasses give `store`: an empty store."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    def write(self, store: Store, name: str, data: bytes) -> None:
        with store.create(name) as file:
            file.write(data)

    def test_reads_back_what_was_written(self, store: Store) -> None:
        self.write(store, "a.arrow", b"0123456789")
        assert store.read("a.arrow", limit=10) == b"0123456789"
        assert store.size("a.arrow") == 10
        assert list(store.names()) == ["a.arrow"]

    @pytest.mark.parametrize(
        ("offset", "length", "expected"),
        [(0, 4, b"0123"), (3, 4, b"3456"), (8, 4, b"89"), (10, 4, b""), (99, 4, b""), (5, 0, b"")],
    )
    def test_ranged_reads_stop_at_the_end(self, store: Store, offset: int, length: int, expected: bytes) -> None:
        self.write(store, "a", b"0123456789")
        out = bytearray(length)
        got = store.read_into("a", offset, memoryview(out))
        assert bytes(out[:got]) == expected

    def test_a_blob_appears_only_when_whole(self, store: Store) -> None:
        with pytest.raises(RuntimeError, match="on purpose"), store.create("a") as file:
            file.write(b"half")
            assert not store.exists("a")
            raise RuntimeError("on purpose")
        assert list(store.names()) == []

    def test_replacing_is_atomic(self, store: Store) -> None:
        self.write(store, "a", b"old")
        assert store.read("a", 10) == b"old"
        with pytest.raises(RuntimeError), store.create("a") as file:
            file.write(b"new")
            raise RuntimeError
        assert store.read("a", 10) == b"old"
        self.write(store, "a", b"newer")
        assert store.read("a", 10) == b"newer"

    def test_missing_blobs_are_source_errors(self, store: Store) -> None:
        for access in (lambda: store.size("no"), lambda: store.read("no", 1)):
            with pytest.raises(SourceError):
                access()
        store.delete("no")
        assert not store.exists("no")

    def test_limits_are_checked_before_reading(self, store: Store) -> None:
        self.write(store, "a", b"0123456789")
        with pytest.raises(LimitError):
            store.read("a", limit=9)

    @pytest.mark.parametrize("name", ["../x", "/x", "", ".x", "a/b", "a\0", "a\n", "x" * 300])
    def test_only_plain_names_are_written(self, store: Store, name: str) -> None:
        with pytest.raises(UsageError):
            self.write(store, name, b"")

    def test_delete(self, store: Store) -> None:
        self.write(store, "a", b"x")
        assert store.size("a") == 1
        store.delete("a")
        assert not store.exists("a")
        with pytest.raises(SourceError):
            store.size("a")

    def test_a_replacement_takes_over_only_when_whole(self, store: Store) -> None:
        self.write(store, "ROOT", b"old")
        self.write(store, "fragments-00001.arrow", b"old")
        with pytest.raises(RuntimeError), store.replacement() as fresh:
            self.write(fresh, "ROOT", b"new")
            raise RuntimeError
        assert store.read("ROOT", 10) == b"old"
        with store.replacement() as fresh:
            self.write(fresh, "ROOT", b"new")
            assert store.read("ROOT", 10) == b"old"
        assert store.read("ROOT", 10) == b"new"
        assert list(store.names()) == ["ROOT"]

    def test_one_writer_at_a_time(self, store: Store) -> None:
        with store.exclusive(), pytest.raises(UsageError, match="written"), store.exclusive():
            pass
        with store.exclusive():
            pass


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "store")

    def test_leftovers_of_a_killed_writer_go(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        ours, foreign = tmp_path / "store" / "fragments-00003.arrow.partial", tmp_path / "store" / "film.mkv.partial"
        for path in (ours, foreign):
            path.write_bytes(b"half")
        assert list(store.names()) == []
        with store.exclusive():
            assert not ours.exists()
            assert foreign.exists()

    def test_another_process_holds_the_lock(self, store: Store, tmp_path: Path) -> None:
        code = f"from holoray.stores import LocalStore\nwith LocalStore({str(tmp_path / 'store')!r}).exclusive(): pass"
        with store.exclusive():
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "UsageError" in run.stderr
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_a_fifo_in_the_place_of_a_file_does_not_hang(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        os.mkfifo(tmp_path / "store" / "a")
        with pytest.raises(SourceError):
            store.size("a")

    def test_no_room_is_a_capacity_error_and_leaves_nothing(self, tmp_path: Path) -> None:
        code = (
            "import resource, signal, sys\n"
            "from holoray.stores import LocalStore\n"
            "from holoray.errors import CapacityError\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            f"store = LocalStore({str(tmp_path / 'full')!r})\n"
            "try:\n"
            "    with store.create('a') as file: file.write(bytes(100_000))\n"
            "except CapacityError as error: print('capacity', error.hint)\n"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.startswith("capacity")
        assert list((tmp_path / "full").iterdir()) == []
        assert CapacityError.exit_code == 5

    def test_a_store_travels_by_pickle(self, store: Store) -> None:
        import pickle

        self.write(store, "a", b"x")
        assert pickle.loads(pickle.dumps(store)).read("a", 1) == b"x"  # noqa: S301
