"""Folders behind addresses: what is listed, fetched, kept, and said when it cannot be."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tuner.builtin.sources.places import inside
from tuner.data.source import Listing
from tuner.errors import ConfigError, DataError

Listed = Callable[..., Listing]


@pytest.fixture
def memory() -> Iterator[tuple[Any, str]]:
    """fsspec's file system in memory, and a folder of its own in it."""
    system = fsspec.filesystem("memory")
    folder = f"/{uuid.uuid4().hex}"
    yield system, folder
    if system.exists(folder):
        system.rm(folder, recursive=True)


def names(listing: Listing) -> list[str]:
    return [Path(found.path).relative_to(listing.root).as_posix() for found in listing.files]


def test_a_folder_is_mirrored_with_its_names_and_caption_files(
    memory: tuple[Any, str], listed: Listed, clip: bytes
) -> None:
    system, folder = memory
    for name in ("b.mp4", "deep/er/a 🐱.MP4", ".hidden/c.mp4", "notes.md"):
        system.pipe(f"{folder}/{name}", clip)
    system.pipe(f"{folder}/b.txt", "ein Pferd 🐴".encode())
    system.pipe(f"{folder}/alone.txt", b"of no clip")
    listing = listed("fsspec", folder=f"memory:/{folder}")
    assert names(listing) == ["b.mp4", "deep/er/a 🐱.MP4"]
    assert all(Path(found.path).read_bytes() == clip and found.size == len(clip) for found in listing.files)
    assert (listing.root / "b.txt").read_text(encoding="utf-8") == "ein Pferd 🐴"
    assert not (listing.root / "alone.txt").exists()
    assert [found.path for found in listing.files] == sorted(found.path for found in listing.files)


def test_only_what_changed_is_fetched_again(served: Any, listed: Listed, clip: bytes) -> None:
    for name in ("one.mp4", "two.mp4"):
        (served.folder / name).write_bytes(clip)
    first = listed("fsspec", folder=served.address)
    assert served.fetched == ["/one.mp4", "/two.mp4"]
    served.asked.clear()
    assert listed("fsspec", folder=served.address) == first
    assert served.fetched == []
    (served.folder / "two.mp4").write_bytes(clip + b"more")
    (served.folder / "three.mp4").write_bytes(clip)
    third = listed("fsspec", folder=served.address)
    assert served.fetched == ["/three.mp4", "/two.mp4"]
    assert names(third) == ["one.mp4", "three.mp4", "two.mp4"]
    assert Path(third.files[2].path).read_bytes() == clip + b"more"


def test_names_with_spaces_come_through_http(served: Any, listed: Listed, clip: bytes) -> None:
    (served.folder / "sub").mkdir()
    (served.folder / "sub" / "two cats.mp4").write_bytes(clip)
    (served.folder / "sub" / "two cats.txt").write_text("zwei")
    listing = listed("fsspec", folder=served.address)
    assert names(listing) == ["sub/two cats.mp4"]
    assert (listing.root / "sub" / "two cats.txt").read_text() == "zwei"


def test_a_hiccup_is_tried_again(served: Any, listed: Listed, clip: bytes) -> None:
    (served.folder / "one.mp4").write_bytes(clip)
    served.failures += [("one.mp4", 503), ("one.mp4", 500), ("one.mp4", 429)]
    listing = listed("fsspec", folder=served.address)
    assert Path(listing.files[0].path).read_bytes() == clip


def test_a_file_that_keeps_failing_is_named_and_the_rest_is_kept(served: Any, listed: Listed, clip: bytes) -> None:
    for name in ("bad.mp4", "good.mp4"):
        (served.folder / name).write_bytes(clip)
    listed("fsspec", folder=served.address)  # so that sizes are known, and only the content fails
    for name in ("bad.mp4", "good.mp4"):
        (served.folder / name).write_bytes(clip * 2)
    served.broken.add("bad.mp4")
    with pytest.raises(DataError, match=r"bad\.mp4.*503"):
        listed("fsspec", folder=served.address)
    served.broken.clear()
    served.asked.clear()
    listing = listed("fsspec", folder=served.address)
    assert served.fetched == ["/bad.mp4"]
    assert [found.size for found in listing.files] == [2 * len(clip)] * 2
    leftovers = [path for path in listing.root.rglob("*") if path.name.startswith(".")]
    assert not leftovers, "nothing half fetched stays"


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(served: Any, listed: Listed, clip: bytes) -> None:
    for name in ("one.mp4", "two.mp4"):
        (served.folder / name).write_bytes(clip)
    driver = (
        "import sys; from pathlib import Path; from tuner.builtin.sources import mirror\n"
        "from tuner.builtin.sources.keys import AddressKeys; from tuner.data.source import Request\n"
        "def killed(file, target):\n"
        "    target.write_bytes(b'half')\n"
        "    import os; os.kill(os.getpid(), 9)\n"
        "mirror.download = killed\n"
        "address, folder = sys.argv[1:]\n"
        "mirror.mirrored(address, {}, Request('d', {}, AddressKeys(), {'.mp4'}, Path(folder)))\n"
    )
    folder = served.folder.parent / "copies"
    done = subprocess.run([sys.executable, "-c", driver, served.address, str(folder)], check=False)
    assert done.returncode == -9
    assert list(folder.rglob(".tuner-partial-*")), "it was killed half way"
    listing = listed("fsspec", folder=served.address)
    assert [Path(found.path).read_bytes() for found in listing.files] == [clip, clip]
    assert listing.root.is_relative_to(folder)
    assert not list(folder.rglob(".tuner-partial-*"))


def test_processes_that_start_together_fetch_once(served: Any, listed: Listed, clip: bytes) -> None:
    for number in range(6):
        (served.folder / f"{number}.mp4").write_bytes(clip)
    with ThreadPoolExecutor(3) as pool:
        listings = list(pool.map(lambda _: listed("fsspec", folder=served.address), range(3)))
    assert listings[0] == listings[1] == listings[2]
    assert served.fetched == [f"/{number}.mp4" for number in range(6)]


def test_a_folder_that_cannot_be_listed_is_an_error_not_a_smaller_dataset(
    served: Any, listed: Listed, clip: bytes
) -> None:
    for name in ("open", "closed"):
        (served.folder / name).mkdir()
        (served.folder / name / "a.mp4").write_bytes(clip)
    served.broken.add("/closed")
    with pytest.raises(DataError, match=r"cannot be listed: 503"):
        listed("fsspec", folder=served.address)


def test_offline_the_whole_copy_is_used_and_said(served: Any, listed: Listed, clip: bytes) -> None:
    (served.folder / "one.mp4").write_bytes(clip)
    online = listed("fsspec", folder=served.address)
    served.stop()
    offline = listed("fsspec", folder=served.address)
    assert (offline.root, offline.files) == (online.root, online.files)
    assert any("cannot be reached" in note and "from before" in note for note in offline.notes)


def test_offline_without_a_whole_copy_is_one_error(served: Any, listed: Listed, clip: bytes) -> None:
    (served.folder / "one.mp4").write_bytes(clip)
    root = listed("fsspec", folder=served.address).root
    served.stop()
    (root / "one.mp4").unlink()
    with pytest.raises(DataError, match=r"cannot be listed: (.|\n)*no whole copy from before"):
        listed("fsspec", folder=served.address)


def test_a_copy_that_someone_changed_is_set_aside(served: Any, listed: Listed, clip: bytes) -> None:
    (served.folder / "one.mp4").write_bytes(clip)
    (served.folder / "one.txt").write_text("as it was")
    root = listed("fsspec", folder=served.address).root
    (root / "one.txt").write_text("a better caption, by hand")
    listed("fsspec", folder=served.address)
    assert (root / "one.txt").read_text() == "as it was"
    (aside,) = root.glob("one.txt.changed-*")
    assert aside.read_text() == "a better caption, by hand"


def test_another_address_has_another_folder(memory: tuple[Any, str], listed: Listed, clip: bytes) -> None:
    system, folder = memory
    system.pipe(f"{folder}/x/clips/a.mp4", clip)
    system.pipe(f"{folder}/y/clips/a.mp4", clip + b"other")
    first = listed("fsspec", folder=f"memory:/{folder}/x/clips")
    second = listed("fsspec", folder=f"memory:/{folder}/y/clips")
    assert first.root != second.root
    assert first.root.name.startswith("clips-")


@pytest.mark.parametrize("name", ["../a.mp4", "a/../../b.mp4", "/etc/a.mp4", "C:\\a.mp4"])
def test_names_that_would_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="leads out of the folder"):
        inside(name, "s3://bucket")


def test_names_with_dots_are_fine() -> None:
    assert inside("a..b/c...mp4", "here") == "a..b/c...mp4"


def test_an_unknown_protocol_names_the_nearest(listed: Listed) -> None:
    with pytest.raises(ConfigError, match=r"no way to read s33://(.|\n)*did you mean 's3'"):
        listed("fsspec", folder="s33://bucket/clips")


def test_a_missing_package_is_named(listed: Listed) -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(ConfigError, match=r"gs:// addresses cannot be read: .*gcsfs"):
        listed("fsspec", folder="gs://bucket/clips")


def test_type_fsspec_needs_an_address(listed: Listed) -> None:
    with pytest.raises(ConfigError, match="needs an address"):
        listed("fsspec", folder="/data/clips")


def test_no_files_of_the_kind(memory: tuple[Any, str], listed: Listed) -> None:
    system, folder = memory
    system.pipe(f"{folder}/a.png", b"x")
    with pytest.raises(DataError, match="no files of its kind"):
        listed("fsspec", folder=f"memory:/{folder}")


def test_a_folder_that_is_not_there(listed: Listed) -> None:
    with pytest.raises(DataError, match=r"cannot be listed(.|\n)*correct the address"):
        listed("fsspec", folder="memory://nowhere/at/all")


def test_secrets_come_from_the_environment_and_stay_out_of_errors(
    served: Any, listed: Listed, monkeypatch: pytest.MonkeyPatch, clip: bytes
) -> None:
    (served.folder / "one.mp4").write_bytes(clip)
    address = served.address.replace("http://", "http://anna:hunter22@") + "/nowhere"
    with pytest.raises(DataError) as caught:
        listed("fsspec", folder=address)
    assert "hunter22" not in str(caught.value)
    with pytest.raises(ConfigError, match="environment variable TUNER_TEST_TOKEN, and there is none"):
        listed("fsspec", folder=served.address, storage_options={"headers": {"X-Token": "$TUNER_TEST_TOKEN"}})
    monkeypatch.setenv("TUNER_TEST_TOKEN", "abc")
    listing = listed("fsspec", folder=served.address, storage_options={"headers": {"X-Token": "${TUNER_TEST_TOKEN}"}})
    assert names(listing) == ["one.mp4"]


def test_options_that_the_file_system_does_not_take(served: Any, listed: Listed, clip: bytes) -> None:
    (served.folder / "one.mp4").write_bytes(clip)
    with pytest.raises((ConfigError, DataError), match="bogus"):
        listed("fsspec", folder=served.address, storage_options={"bogus": 1})


def test_what_is_kept_on_disk_holds_no_secret(served: Any, listed: Listed, clip: bytes, tmp_path: Path) -> None:
    (served.folder / "one.mp4").write_bytes(clip)
    listed("fsspec", folder=served.address, storage_options={"headers": {"Authorization": "Bearer verysecretvalue"}})
    for path in (tmp_path / "copies").rglob("*"):
        assert not path.is_file() or b"verysecretvalue" not in path.read_bytes()
