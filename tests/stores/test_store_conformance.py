"""What every store does. A new store's test is a subclass that gives one fixture."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import S3, FileServer, s3_server, served

import holoray
from holoray.errors import CapacityError, LimitError, SourceError, UsageError
from holoray.stores import FlightStore, HttpStore, LocalStore, MemoryStore, RemoteStore, Store
from holoray.tensor import Array

Model = dict[str, Array]


class StoreReadTests:
    """Subclasses give `store`: an empty store, and `write` where the store itself cannot."""

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
        assert store.exists("a.arrow")

    @pytest.mark.parametrize(
        ("offset", "length", "expected"),
        [(0, 4, b"0123"), (3, 4, b"3456"), (8, 4, b"89"), (10, 4, b""), (99, 4, b""), (5, 0, b"")],
    )
    def test_ranged_reads_stop_at_the_end(self, store: Store, offset: int, length: int, expected: bytes) -> None:
        self.write(store, "a", b"0123456789")
        out = bytearray(length)
        got = store.read_into("a", offset, memoryview(out))
        assert bytes(out[:got]) == expected

    def test_missing_blobs_are_source_errors(self, store: Store) -> None:
        for access in (lambda: store.size("no"), lambda: store.read("no", 1)):
            with pytest.raises(SourceError):
                access()
        assert not store.exists("no")

    @pytest.mark.fault("bomb")
    def test_limits_are_checked_before_reading(self, store: Store) -> None:
        self.write(store, "a", b"0123456789")
        with pytest.raises(LimitError):
            store.read("a", limit=9)

    def test_several_threads_read_at_once(self, store: Store) -> None:
        data = np.random.default_rng(0).bytes(300_000)
        self.write(store, "a", data)

        def read(offset: int) -> bool:
            out = bytearray(10_000)
            return store.read_into("a", offset, memoryview(out)) == 10_000 and out == data[offset : offset + 10_000]

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(read, list(range(0, 290_000, 7_919)) * 2))


class StoreTests(StoreReadTests):
    """What a store that can be written does besides."""

    def test_lists_what_was_written(self, store: Store) -> None:
        assert list(store.names()) == []
        self.write(store, "b", b"1")
        self.write(store, "a.arrow", b"2")
        assert list(store.names()) == ["a.arrow", "b"]

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

    @pytest.mark.fault("hostile-name")
    @pytest.mark.parametrize("name", ["../x", "/x", "", ".x", "a/b", "a\0", "a\n", "x" * 300])
    def test_only_plain_names_are_written(self, store: Store, name: str) -> None:
        with pytest.raises(UsageError):
            self.write(store, name, b"")

    def test_delete(self, store: Store) -> None:
        store.delete("no")
        self.write(store, "a", b"x")
        assert store.size("a") == 1
        store.delete("a")
        assert not store.exists("a")
        with pytest.raises(SourceError):
            store.size("a")

    @pytest.mark.fault("killed-encode")
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

    @pytest.mark.fault("two-writers")
    def test_one_writer_at_a_time(self, store: Store) -> None:
        with store.exclusive(), pytest.raises(UsageError, match="written"), store.exclusive():
            pass
        with store.exclusive():
            pass


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class RemoteStoreTests(StoreTests):
    """What a store at a URI does besides."""

    def test_a_store_travels_by_pickle(self, store: Store) -> None:
        self.write(store, "a", b"x")
        assert pickle.loads(pickle.dumps(store)).read("a", 1) == b"x"  # noqa: S301

    def test_an_upload_that_breaks_leaves_nothing(self, store: Store) -> None:
        def break_off(spool: Any, target: Any, length: int) -> None:
            target.write(spool.read(3))
            raise ConnectionResetError("on purpose")

        broken = mock.patch("holoray.stores.remote.shutil.copyfileobj", break_off)
        with pytest.raises(SourceError, match="on purpose"), broken, store.create("a") as file:
            file.write(b"0123456789")
        assert list(store.names()) == []
        assert not store.exists("a")

    @pytest.mark.fault("disk-full")
    def test_no_room_to_spool_is_a_capacity_error(self, store: Store) -> None:
        with pytest.raises(CapacityError) as caught, store.create("a"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert "TMPDIR" in caught.value.hint

    @pytest.mark.fault("forged-xxh3")
    def test_its_bytes_are_checked_with_sha256(self, store: Store, model: Model) -> None:
        holoray.encode(model, store, codec="raw")
        assert holoray.open(store).strict
        assert holoray.open(store).load()["embed.weight"].tobytes() == model["embed.weight"].tobytes()


class TestArrowLocal(RemoteStoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return RemoteStore(f"file://{tmp_path}/store")

    @pytest.mark.fault("disk-full")
    def test_a_full_disk_over_there_is_a_capacity_error(self, tmp_path: Path) -> None:
        """/dev/full takes nothing: what a write to a full disk meets."""
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "a.partial").symlink_to("/dev/full")
        with pytest.raises(CapacityError) as caught, RemoteStore(f"file://{tmp_path}/full").create("a") as file:
            file.write(bytes(10_000))
        assert "free some space" in caught.value.hint
        assert list(RemoteStore(f"file://{tmp_path}/full").names()) == []

    def test_files_kept_open_are_bounded(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("holoray.stores.remote._MAX_IDLE", 3)
        for number in range(6):
            self.write(store, f"b{number}", bytes([number]))
        before = len(os.listdir("/proc/self/fd"))
        assert [store.read(f"b{number}", 1) for number in range(6)] == [bytes([n]) for n in range(6)]
        assert len(os.listdir("/proc/self/fd")) <= before + 3

    @pytest.mark.fault("killed-encode")
    def test_leftovers_of_a_killed_writer_go(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        ours = tmp_path / "store" / "fragments-00003.arrow.partial"
        ours.write_bytes(b"half")
        assert list(store.names()) == []
        with store.exclusive():
            assert not ours.exists()


class TestFsspecMemory(RemoteStoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return RemoteStore(f"memory://{tmp_path}/store")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


class TestS3(RemoteStoreTests):
    @pytest.fixture
    def store(self, s3: S3, tmp_path: Path) -> Store:
        return RemoteStore(s3.uri(f"stores/{tmp_path.name}"))

    def test_a_missing_bucket_and_no_permission_say_so(self, s3: S3) -> None:
        with pytest.raises(SourceError, match="not found"):
            self.write(RemoteStore(s3.uri("x", bucket="nowhere")), "a", b"")
        refused = OSError("AWS Error ACCESS_DENIED during HeadObject operation")
        store = RemoteStore(s3.uri("x"))
        with mock.patch.object(RemoteStore, "_filesystem") as filesystem, pytest.raises(SourceError) as caught:
            filesystem.open_input_file.side_effect = refused
            store.size("a")
        assert "permissions" in caught.value.hint


class ReadOnlyStoreTests(StoreReadTests):
    """What a store that others serve, from `tmp_path`, does besides."""

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    def write(self, store: Store, name: str, data: bytes) -> None:
        (self.directory / name).write_bytes(data)

    def test_nothing_is_written(self, store: Store) -> None:
        for write in (
            lambda: store.create("a"),
            lambda: store.delete("a"),
            lambda: store.exclusive(),
            lambda: store.replacement(),
            lambda: holoray.encode({"w": np.zeros(3)}, store),
        ):
            with pytest.raises(UsageError, match="only be read"):
                write()

    def test_a_store_travels_by_pickle(self, store: Store) -> None:
        self.write(store, "a", b"x")
        assert pickle.loads(pickle.dumps(store)).read("a", 1) == b"x"  # noqa: S301


class TestHttpStore(ReadOnlyStoreTests):
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[FileServer]:
        with served(tmp_path) as server:
            yield server

    @pytest.fixture
    def store(self, server: FileServer) -> Store:
        return HttpStore(server.url)

    def test_names_without_a_listing(self, store: Store) -> None:
        assert list(store.names()) == []
        self.write(store, "ROOT", b"x")
        assert list(store.names()) == ["ROOT"]

    def test_connections_are_reused(self, store: Store, server: FileServer) -> None:
        self.write(store, "a", b"0123456789")
        for _ in range(20):
            assert store.read("a", 10) == b"0123456789"
            assert not store.exists("b")
        assert server.requests.total() == 40
        assert server.connections == 1

    @pytest.mark.fault("bad-server")
    @pytest.mark.parametrize("mode", ["no ranges", "other range", "short", "silent", 401, 403, 404, 500, 503])
    def test_whatever_a_server_does_is_a_source_error(self, mode: str | int, store: Store, server: FileServer) -> None:
        self.write(store, "a", b"0123456789")
        server.mode = mode
        with pytest.raises(SourceError, match=f"{server.url}/a: ") as caught:
            store.read_into("a", 2, memoryview(bytearray(4)))
        assert caught.value.hint
        assert caught.value.source == server.url
        with suppress(SourceError):  # a HEAD may well succeed
            assert store.size("a") == 10
        server.mode = ""
        assert store.read("a", 10) == b"0123456789"

    @pytest.mark.fault("bad-server")
    def test_a_length_that_is_not_told(self, store: Store, server: FileServer) -> None:
        server.mode = "no length"
        self.write(store, "a", b"0123456789")
        with pytest.raises(SourceError, match="how long"):
            store.size("a")

    @pytest.mark.fault("bad-server")
    @given(size=st.integers(0, 50), limit=st.integers(0, 60))
    @settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_whole_blob_is_one_request(self, store: Store, server: FileServer, size: int, limit: int) -> None:
        self.write(store, "a", bytes(range(size)))
        server.requests.clear()
        if size > limit:
            with pytest.raises(LimitError, match=f"has {size} bytes"):
                store.read("a", limit)
        else:
            assert store.read("a", limit) == bytes(range(size))
        assert server.requests.total() == 1

    def test_redirects_are_followed(self, store: Store, server: FileServer) -> None:
        self.write(store, "a", b"0123456789")
        server.mode = "redirect"
        assert store.read("a", 10) == b"0123456789"


class TestFlightStore(ReadOnlyStoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
        """Behind a real server, which for once serves files that no store has."""
        holoray.encode({"w": np.zeros(3, np.float32)}, tmp_path)
        monkeypatch.setattr("holoray.pipelines.serve.is_own", lambda name: name in ("a", "a.arrow"))
        with holoray.serve(tmp_path) as server:
            yield FlightStore(server.uri)

    def test_lists_what_is_there(self, store: Store) -> None:
        assert list(store.names()) == []
        self.write(store, "a.arrow", b"1")
        self.write(store, "b", b"2")
        self.write(store, "a", b"3")
        assert list(store.names()) == ["a", "a.arrow"]

    def test_only_plain_names_are_asked_for(self, store: Store) -> None:
        for name in ("../x", "/etc/passwd", "", ".lock", "a/b", "a\0", "a\n", "é", "x" * 300):
            for access in (store.size, lambda name: store.read(name, 9)):
                with pytest.raises(UsageError, match="is not a file name"):
                    access(name)

    @given(size=st.integers(0, 50), offset=st.integers(0, 60), length=st.integers(1, 60), piece=st.integers(1, 20))
    @settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_ranges_come_in_pieces(self, store: Store, size: int, offset: int, length: int, piece: int) -> None:
        self.write(store, "a", bytes(range(size)))
        out = bytearray(length)
        with mock.patch("holoray.pipelines.serve.PIECE_BYTES", piece):
            got = store.read_into("a", offset, memoryview(out))
            with mock.patch("holoray.stores.read_only.PIECE_BYTES", piece):
                assert store.read_into("a", offset, memoryview(bytearray(length))) == got
        assert out[:got] == bytes(range(size))[offset : offset + length]

    def test_blobs_beyond_the_first_answer(self, store: Store) -> None:
        data = np.random.default_rng(0).bytes(3_000_001)
        self.write(store, "a", data)
        assert store.read("a", len(data)) == data
        with pytest.raises(LimitError):
            store.read("a", len(data) - 1)


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "store")

    @pytest.mark.fault("killed-encode")
    def test_leftovers_of_a_killed_writer_go(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        ours, foreign = tmp_path / "store" / "fragments-00003.arrow.partial", tmp_path / "store" / "film.mkv.partial"
        for path in (ours, foreign):
            path.write_bytes(b"half")
        assert list(store.names()) == []
        with store.exclusive():
            assert not ours.exists()
            assert foreign.exists()

    @pytest.mark.fault("two-writers")
    def test_another_process_holds_the_lock(self, store: Store, tmp_path: Path) -> None:
        code = f"from holoray.stores import LocalStore\nwith LocalStore({str(tmp_path / 'store')!r}).exclusive(): pass"
        with store.exclusive():
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "UsageError" in run.stderr
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    @pytest.mark.fault("changing-file")
    def test_a_fifo_in_the_place_of_a_file_does_not_hang(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        os.mkfifo(tmp_path / "store" / "a")
        with pytest.raises(SourceError):
            store.size("a")

    @pytest.mark.fault("disk-full")
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
        self.write(store, "a", b"x")
        assert pickle.loads(pickle.dumps(store)).read("a", 1) == b"x"  # noqa: S301
