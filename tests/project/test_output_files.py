"""What commands leave behind: whole files or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dwdp.cli.output_files import OutputFiles, check_writable, write_files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_replaced_whole_with_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        (tmp_path / "a").write_text("old")
        (tmp_path / "link").symlink_to(tmp_path / "target")
        (tmp_path / "target").write_text("old")
        write_files({tmp_path / "a": "new", tmp_path / "link": "ünicode", Path("/dev/null"): "x"})
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text(encoding="utf-8") == "ünicode"
    assert names(tmp_path) == ["a", "link", "target"]


@pytest.mark.parametrize("bad", ["gone/b", "folder"])
def test_if_one_file_cannot_be_written_none_is(tmp_path: Path, bad: str) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=bad.partition("/")[0]):
        write_files({tmp_path / "a": "new", tmp_path / bad: "new"})
    assert names(tmp_path) == ["a", "folder"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_pipe_gets_nothing_when_a_file_cannot_be_written(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="gone"):
            write_files({pipe: "text", tmp_path / "gone" / "b": "new"})
        assert os.read(reader, 100) == b""
        write_files({pipe: "text", tmp_path / "b": "new"})
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert names(tmp_path) == ["b", "pipe"]


def test_no_file_is_replaced_when_a_device_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_files({tmp_path / "a": "new", Path("/dev/full"): "x"})
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with OutputFiles() as files:
        made = files.folder(out)
        (made / "images").mkdir()
        (made / "page").write_text("page")
        (made / "images" / "one").write_text("one")
        assert not out.parent.exists()
    assert (out / "page").read_text() == "page"
    assert (out / "images" / "one").read_text() == "one"
    assert (names(tmp_path), names(out)) == (["new"], ["images", "page"])


def test_a_folder_keeps_what_it_has_if_something_goes_wrong(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("old")

    def write(*, goes_wrong: bool) -> None:
        with OutputFiles() as files:
            (files.folder(tmp_path) / "page").write_text("new")
            files.write(tmp_path / "json", "{}")
            if goes_wrong:
                raise ValueError("no plot")

    with pytest.raises(ValueError, match="no plot"):
        write(goes_wrong=True)
    assert names(tmp_path) == ["page"]
    assert (tmp_path / "page").read_text() == "old"
    (tmp_path / "other").touch()
    write(goes_wrong=False)
    assert names(tmp_path) == ["json", "other", "page"]
    assert (tmp_path / "page").read_text() == "new"


def test_a_pipe_in_a_folder_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "page")
    reader = os.open(tmp_path / "page", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with OutputFiles() as files:
            (files.folder(tmp_path) / "page").write_text("page")
        assert os.read(reader, 100) == b"page"
    finally:
        os.close(reader)
    assert (tmp_path / "page").is_fifo()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("folder", "is a directory; name a file"),
        ("none/file", "there is no directory"),
        ("file/file", "there is no directory"),
        ("/proc/dwdp", "cannot be written"),
        ("link into nowhere", "there is no directory .*/nowhere"),
        ("link into proc", "cannot be written"),
        ("loop", "lead round in a circle"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link into nowhere").symlink_to(tmp_path / "nowhere" / "file")
    (tmp_path / "link into proc").symlink_to("/proc/dwdp")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match=what):
        check_writable(tmp_path / name)


def test_the_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "out")
    check_writable(Path("/dev/null"))
    assert list(tmp_path.iterdir()) == []
