"""Files of an image folder: found by a scan, or named by a list or a table."""

from __future__ import annotations

import os
import posixpath
import re
import stat
import unicodedata
from collections.abc import Collection
from pathlib import Path

from ldm.data.base import DataConfigError
from ldm.data.image import EXTENSIONS
from ldm.paths import expand_user, lines_of


def existing_folder(param: str, value: str | None, content: str) -> Path:
    """Return `value` as the path of an existing folder of `content`; raise DataConfigError otherwise."""
    advice = f"set {{param}} to a folder of {content}"
    if value is None:
        raise DataConfigError(param, value, "not set", advice)
    folder = expand_user(value)
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "no such folder"
        raise DataConfigError(param, str(value), problem, advice)
    return folder


class NamedAlike:
    """Files of another folder, named as the images of `root` are, with any suffix: `a/cat.png` for `a/cat.jpg`.

    param: the setting that names the folder, e.g. "masks". whole: the folder that holds root, if root is that of a
    split; the files are named relative to either.
    """

    def __init__(self, param: str, folder: str, root: Path, whole: Path) -> None:
        self.param, self.folder, self.kind = param, folder, param.removesuffix("s")
        path = existing_folder(param, folder, param)
        self._inside = root.relative_to(whole) if root.is_relative_to(whole) else Path()
        self._files: dict[str, list[Path]] = {}  # by their names without suffix
        for name in scan(path):
            self._files.setdefault(str(Path(name).with_suffix("")), []).append(path / name)
        own, images = (os.path.realpath(each) for each in (path, root))
        among = f"{own}/".startswith(f"{images}/")
        self._among: str | None = f"{os.path.relpath(own, images)}/".removeprefix("./") if among else None

    def of(self, name: str) -> list[Path]:
        """Return the files of an image, which should be one."""
        stem = Path(name).with_suffix("")
        found = self._files.get(str(self._inside / stem)) or self._files.get(str(stem)) or []
        same = [path for path in found if path.name == Path(name).name]
        return same or found

    def problem(self, name: str) -> str:
        """Return why an image has not one file; empty if it has. DataConfigError if the files are images of root."""
        if self._among is not None and name.startswith(self._among):
            problem = f"is in the folder of the images, so that the {self.kind} {name} is an image too"
            raise DataConfigError(self.param, self.folder, problem, "move it out of root, and set {param} to it")
        found = self.of(name)
        if len(found) == 1:
            return ""
        return (
            f"has several {self.param}: {', '.join(map(str, found))}"
            if found
            else f"has no {self.kind} in {self.folder}"
        )


def is_hidden(name: str) -> bool:
    """True for hidden files and folders, and for those that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def scan(root: Path, suffixes: Collection[str] = EXTENSIONS) -> list[str]:
    """Return the images below `root`, hidden ones excepted, as sorted relative names with forward slashes.

    Links are followed; a file or folder that several names lead to is listed once, under a name without links if any.
    """
    names: list[str] = []
    links: list[str] = []
    real_folders: dict[str, str] = {}  # prefix of the names -> folder
    seen: set[str] = set()
    folders = [""]
    linked_folders: list[str] = []
    while folders or linked_folders:
        prefix = folders.pop() if folders else linked_folders.pop(0)
        real = os.path.realpath(root / prefix)
        if real in seen:  # a link to a folder that is listed already, such as a parent
            continue
        seen.add(real)
        real_folders[prefix] = real
        with os.scandir(root / prefix) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    (linked_folders if entry.is_symlink() else folders).append(f"{prefix}{entry.name}/")
                elif Path(entry.name).suffix.lower() not in suffixes:
                    continue
                elif entry.is_symlink():
                    links.append(prefix + entry.name)
                elif entry.is_file():  # no pipe or device
                    names.append(prefix + entry.name)
    if links:
        parts = (name.rpartition("/") for name in names)
        listed = {os.path.join(real_folders[folder + slash], base) for folder, slash, base in parts}
        for name in sorted(links):
            real = os.path.realpath(root / name)
            if real not in listed:
                names.append(name)
                listed.add(real)
    return sorted(names)


def relative_name(text: str) -> str:
    """Return a path of a list or table in its normal form, with forward slashes: "a/b.png" for r".\\a\\b.png".

    Raises ValueError for a path that may leave the root, since lists and tables are not trusted.
    """
    name = text.replace("\\", "/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"the path {text!r} leaves the root: expected a relative one")
    if ".." in name.split("/"):
        raise ValueError(f"the path {text!r} leaves the root")
    return posixpath.normpath(name)


class FileNames:
    """Names of the files below `root`: all spellings and links that lead to one file have one name, the first found."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, str] = {}  # folder -> its real path
        self._names: dict[str, str] = {}  # real path -> name

    def find(self, name: str) -> str | None:
        """Return the name of an existing file whose path is `name` in any Unicode normal form; None without one."""
        for form in dict.fromkeys((name,) if name.isascii() else (name, self._form_on_disk(name))):
            try:
                mode = os.lstat(f"{self.root}/{form}").st_mode
            except (OSError, ValueError):
                continue
            folder, _, base = form.rpartition("/")
            if folder not in self._folders:
                self._folders[folder] = os.path.realpath(self.root / folder)
            real = os.path.realpath(self.root / form) if stat.S_ISLNK(mode) else f"{self._folders[folder]}/{base}"
            if stat.S_ISREG(mode) or os.path.isfile(real):
                return self._names.setdefault(real, form)
        return None

    def _form_on_disk(self, name: str) -> str:
        """Return `name` with each part in the normal form, NFC or NFD, of an existing file or folder."""
        found = ""
        for part in name.split("/"):
            forms = dict.fromkeys((part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))))
            part = next((form for form in forms if os.path.lexists(f"{self.root}/{found}{form}")), part)
            found += f"{part}/"
        return found[:-1]


def read_lines(param: str, file: str, content: str) -> list[str]:
    """Return the non-blank lines of a UTF-8 file, stripped; raise DataConfigError if it cannot be read."""
    path = expand_user(file)
    if not path.is_file():
        raise DataConfigError(param, str(file), "no such file", f"set {{param}} to {content}")
    try:
        lines = lines_of(path.read_bytes().decode("utf-8-sig"))
    except UnicodeError as error:
        raise DataConfigError(param, str(file), f"not UTF-8 text ({error})", f"set {{param}} to {content}") from error
    return [line.strip() for line in lines if line.strip()]


def read_list(file: str, root: Path, suffixes: Collection[str] = EXTENSIONS) -> list[str]:
    """Return the images listed in a text file, one path relative to `root` on each line, in its order."""
    content = f"a text file with one path below {root} on each line"
    names = []
    for line in read_lines("files", file, content):
        try:
            names.append(relative_name(line))
        except ValueError as error:
            raise DataConfigError("files", str(file), str(error), f"set {{param}} to {content}") from error
        if Path(line).suffix.lower() not in suffixes:
            raise DataConfigError("files", str(file), f"{line!r} is not an image", "set {param} to a list of images")
    return names
