"""What commands leave behind: files that appear together and whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from errno import EISDIR
from pathlib import Path
from types import TracebackType


class OutputFiles:
    """Files that are moved to their places together, when the ``with`` block ends without an error.

    Until then they are beside their places. If anything goes wrong before the first move, nothing is left
    of any and what was there before is as it was. Pipes and devices (/dev/stdout for one) cannot be moved
    to: they are written last, just before the moves, and keep what they got if one of them fails.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(self) -> None:
        self._cleanup = ExitStack()
        self._moves: list[tuple[Path, Path]] = []
        self._folders: list[tuple[Path, Path]] = []
        self._specials: list[tuple[Path, bytes]] = []

    def write(self, path: Path, text: str) -> None:
        """Have ``path`` hold ``text``; its folder has to be there. A link is followed, not replaced."""
        if _is_special(path):
            self._specials.append((path, text.encode()))
            return
        target = target_of(path)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".dwdp.")
        self._cleanup.callback(Path(name).unlink, missing_ok=True)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        self._moves.append((Path(name), target))

    def folder(self, path: Path) -> Path:
        """A folder to write to, whose files are moved to ``path``. Other files that are there stay."""
        place = target_of(path)
        while not place.is_dir():
            place = place.parent
        made = Path(tempfile.mkdtemp(dir=place, prefix=".dwdp."))
        self._cleanup.callback(shutil.rmtree, made, ignore_errors=True)
        self._folders.append((made, path))
        return made

    def __enter__(self) -> OutputFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._cleanup:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        for made, path in self._folders:
            for file in filter(Path.is_file, sorted(made.rglob("*"))):
                place = path / file.relative_to(made)
                if _is_special(place):
                    self._specials.append((place, file.read_bytes()))
                else:
                    self._moves.append((file, target_of(place)))
        for _, target in self._moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(target))
        for path, content in self._specials:
            path.write_bytes(content)
        for written, target in self._moves:
            os.replace(written, target)


def write_files(contents: Mapping[Path, str]) -> None:
    """Write each text to its path, as :class:`OutputFiles` does.

    Raises:
        OSError: a file cannot be written.
    """
    with OutputFiles() as files:
        for path, text in contents.items():
            files.write(path, text)


def check_writable(path: Path) -> None:
    """Check that ``path`` can be written, and leave nothing behind.

    Raises:
        ValueError: it cannot; the text says why.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file")
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise ValueError(f"{path} cannot be written")
        return
    folder = target_of(path).parent
    if not folder.is_dir():
        raise ValueError(f"{path}: there is no directory {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def target_of(path: Path) -> Path:
    """Where ``path`` leads to when every link on the way is followed; it need not be there.

    Raises:
        ValueError: its links lead round in a circle.
    """
    try:
        target = path.resolve()
    except RuntimeError:  # Python before 3.13
        target = path
    if target.is_symlink():
        raise ValueError(f"{path}: its symbolic links lead round in a circle")
    return target


def _is_special(path: Path) -> bool:
    """A pipe or a device is written to, not replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
