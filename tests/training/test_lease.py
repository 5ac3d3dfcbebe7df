"""One owner per folder: two at once, dead owners, owners that nobody can see, in a folder and in a bucket."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.support.buckets import NAME
from wavlm_jax.training import lease
from wavlm_jax.training.lease import Lease, TakenError, held, owned_workdir
from wavlm_jax.training.workdir import Workdir, exists, list_names, read_bytes, swap, write_object


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "run")
    request.getfixturevalue("objects")
    return f"gs://{NAME}/{tmp_path.name}"


def write(place: str, change: Callable[[dict], dict]) -> None:
    """Somebody else's lease: ours, changed."""
    if not place.startswith("gs:"):
        Path(place).mkdir(exist_ok=True)
    values = asdict(Lease(place)._owner)
    write_object(f"{place}/{lease.NAME}", json.dumps(values | change(values)).encode())


def test_a_file_is_replaced_only_where_it_is_what_was_read(place: str) -> None:
    path = f"{place}/file"
    assert not swap(path, b"a", b"b")
    assert swap(path, None, b"a")
    assert not swap(path, None, b"b")
    assert not swap(path, b"b", None)
    assert read_bytes(path) == b"a"
    assert swap(path, b"a", b"longer")
    assert swap(path, b"longer", b"b")
    assert read_bytes(path) == b"b"
    assert swap(path, b"b", None)
    assert not swap(path, b"b", None)


def test_of_many_at_once_one_is_the_owner(place: str) -> None:
    """Even where a dead owner's lease is to be followed."""
    write(place, lambda _: {"pid": dead_process()})
    leases, taken, refused = [Lease(place) for _ in range(8)], list[Lease](), list[str]()
    start = threading.Barrier(len(leases))

    def take(one: Lease) -> None:
        start.wait()
        try:
            one.take()
            taken.append(one)
        except TakenError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take, args=(one,)) for one in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    assert all(f"{place}: belongs to process {os.getpid()} on " in text for text in refused)
    taken[0].release()
    assert not exists(f"{place}/{lease.NAME}")


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


@pytest.mark.parametrize("harm", [{"born": "1"}, {"pid": 2**40}], ids=["pid used again", "no such pid"])
def test_a_dead_owner_on_this_machine_is_followed_at_once(place: str, monkeypatch, harm: dict) -> None:
    monkeypatch.setattr(lease, "STALE", 600.0)
    write(place, lambda _: harm)
    with held(place):
        assert str(os.getpid()) in read_bytes(f"{place}/{lease.NAME}").decode()
    assert list_names(place) == []


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        assert lease._born(process.pid) is not None or process.poll() is not None
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert lease._born(process.pid) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {"machine": "another"},
        lambda values: {"place": values["place"] + "-copied"},
        lambda _: {"pid": "no number"},
    ],
    ids=["another machine", "a copied folder", "rubbish"],
)
def test_what_nobody_can_see_is_followed_when_its_heartbeat_stands_still(
    place: str, monkeypatch, capsys, change: Callable[[dict], dict]
) -> None:
    monkeypatch.setattr(lease, "STALE", 0.3)
    write(place, change)
    with held(place):
        assert "waiting 0 s for a sign of its life" in capsys.readouterr().out


def test_an_owner_on_another_machine_that_lives_is_left_alone(place: str, monkeypatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.05)
    other = Lease(place)
    other._owner = replace(other._owner, machine="another", host="far")
    other.take()
    with pytest.raises(TakenError, match=r"belongs to process \d+ on 'far' since"):
        Lease(place).take()
    other.release()
    with held(place):
        pass


def test_who_was_taken_for_dead_writes_nothing_more(place: str, monkeypatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.05)
    said, done = list[str](), threading.Event()

    def ended(message: str) -> None:
        said.append(message)
        done.set()

    suspended = Lease(place, ended)
    suspended.take()
    while not done.is_set():  # a beat may come between; then once more
        write(place, lambda _: {"pid": 77})
        done.wait(1)
    assert f"{place}: process 77 on " in said[0]
    with pytest.raises(TakenError, match="has taken this folder"):
        suspended.beat()
    suspended.release()
    assert b"77" in read_bytes(f"{place}/{lease.NAME}")


def test_a_workdir_that_was_taken_publishes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    workdir = Workdir(home, tmp_path / "mirror")
    workdir.folder.mkdir()
    workdir.fetch()
    (workdir.folder / "metrics.jsonl").write_text("a line")
    with owned_workdir(workdir), owned_workdir(workdir):
        write(str(home), lambda _: {"pid": 77})
        with pytest.raises(TakenError, match="process 77"):
            workdir.publish()
    assert not (home / "metrics.jsonl").exists()
    assert workdir.guard is None


def test_a_full_disk_ends_no_owner(tmp_path: Path, monkeypatch) -> None:
    one = Lease(tmp_path)
    one.take()
    with monkeypatch.context() as patch:
        patch.setattr(lease, "swap", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            one.beat()
    one.beat()
    one.beat()
    one.release()
    assert list(tmp_path.iterdir()) == []
