"""A folder of files that are made together, and replaced together by the next output of their kind."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from analysis.errors import AnalysisError
from analysis.runs.whole_file import write_whole

_NEW = ".new-"
_LEFT_BEHIND = re.compile(re.escape(_NEW) + r"[a-z0-9_]{8}")
"""Names of unfinished folders, as `tempfile` makes them."""


@dataclass(frozen=True)
class OutputFolder:
    """The allowed contents of the folder of one kind of output.

    what: a word for the output, for messages. main: the file that a reader opens first; it is moved in last. listed:
    name of the list of the files written. The next output of this kind may replace or remove these files, and touches
    no other. names: files in the folder itself. parts: folders in it, with files of any name.
    """

    what: str
    main: str
    listed: str
    names: tuple[str, ...]
    parts: tuple[str, ...] = ()

    def check(self, out: Path) -> list[str]:
        """The files that an earlier output lists there, as paths relative to `out`; none if there is no list.

        Raises:
            AnalysisError: the list is not one of this kind; the main file exists but is not listed; or the folder, the
                list, a part or a listed file is a symbolic link, which may lead to files of others.
        """
        self._refuse_links(out, ["", self.listed, *self.parts])
        before = self._written_before(out)
        self._refuse_links(out, before)
        if os.path.lexists(out / self.main) and self.main not in before:
            raise self._foreign(out / self.main)
        return before

    def write(self, out: Path, make: Callable[[Path], object]) -> list[str]:
        """Fill `out` with the files that `make` writes to an empty folder; return their names, sorted.

        The files are first made in a folder inside `out`, and then moved in one by one. Files that only an earlier
        output has are removed, and so are unfinished folders of an output that was killed.

        Raises:
            AnalysisError: `out` cannot be written, or a file or folder of others is where a file should be.
        """
        before = self.check(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._remove_left_behind(out)
            with tempfile.TemporaryDirectory(prefix=_NEW, dir=out) as new:
                make(Path(new))
                return self._move_in(Path(new), out, before)
        except OSError as error:
            raise AnalysisError(f"cannot write the {self.what} to {out}: {error.strerror or error}") from error

    def _move_in(self, new: Path, out: Path, before: list[str]) -> list[str]:
        made = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
        for name in made:
            if os.path.lexists(out / name) and name not in before:
                raise self._foreign(out / name)
        both = sorted({*made, *before})
        self._refuse_links(out, made)
        for name in both:
            if (out / name).is_dir():
                raise self._foreign(out / name)
            for parent in PurePosixPath(name).parents:
                if os.path.lexists(out / parent) and not (out / parent).is_dir():
                    raise AnalysisError(f"{out / parent} exists and is not a folder; choose another folder")
        # Until all files are in place, the list names those of both outputs: an interrupted output can be replaced too.
        self._list_written(new, out, both)
        for name in [*(name for name in made if name != self.main), self.main]:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, out / name)
        for name in before:
            if name not in made:
                (out / name).unlink(missing_ok=True)
        self._list_written(new, out, made)
        return made

    def _list_written(self, new: Path, out: Path, names: list[str]) -> None:
        text = json.dumps({"written": names}, indent=1) + "\n"
        write_whole(out / self.listed, text.encode(), via=new, mode=0o666)

    def _refuse_links(self, out: Path, names: Iterable[str]) -> None:
        for name in names:
            for path in (out / name, *(out / parent for parent in PurePosixPath(name).parents)):
                if path.is_symlink():
                    raise AnalysisError(f"{path} is a symbolic link, where no {self.what} may be written; remove it")

    def _written_before(self, out: Path) -> list[str]:
        listed = out / self.listed
        if not listed.exists():
            return []
        try:
            names = json.loads(listed.read_text(encoding="utf-8"))["written"]
            inside = all(self._is_own(name) for name in names)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise AnalysisError(f"{listed} is not the list of a {self.what}'s files; choose another folder") from error
        if not inside:
            raise AnalysisError(f"{listed} names files outside a {self.what}; choose another folder")
        return names

    def _is_own(self, name: str) -> bool:
        parts = PurePosixPath(name).parts
        inside = len(parts) > 1 and parts[0] in self.parts and ".." not in parts and "\0" not in name
        return inside or name in self.names

    def _remove_left_behind(self, out: Path) -> None:
        own = {*self.names, *self.parts, self.listed}
        for folder in out.iterdir():
            is_ours = _LEFT_BEHIND.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
            if is_ours and all(path.name in own for path in folder.iterdir()):
                shutil.rmtree(folder)

    def _foreign(self, path: Path) -> AnalysisError:
        return AnalysisError(f"{path} exists and was not written by a {self.what}; choose another folder")
