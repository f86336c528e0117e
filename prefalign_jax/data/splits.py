"""Which files of a directory belong to which split, told by their names as `datasets` does."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from prefalign_jax.types import UserError

TRAIN, VALIDATION, TEST = _SPLITS = ("train", "validation", "test")
_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "heldout", "holdout"), TEST),
}
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")  # between the words of 'myTest'
_OF_DATA = re.compile(r"(?<=.)(set|data|split)s?$")  # 'testset'
_SHARD = re.compile(r"(\w+)-\d+(-of-\d+)?\.")  # 'train_prefs-00000-of-00001.parquet' is of a split of that name
# Of a data set, but no data.
_ABOUT = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def split_of(name: str) -> str | None:
    """The split that the words of a name say, the last one if several do; None if none does.

    Example:
      >>> split_of("mydata_test.jsonl"), split_of("dev-00000-of-00001"), split_of("latest.jsonl"), split_of("trainSet")
      ('test', 'validation', None, 'train')
    """
    words = re.split(r"[^a-z]+", _HUMP.sub("_", name).lower().replace("-", "_").replace("_out", "out"))
    words = [_OF_DATA.sub("", word) for word in words]
    return next((_WORDS[word] for word in reversed(words) if word in _WORDS), None)


def split_of_file(path: PurePosixPath) -> str | None:
    """The split of a file of a directory: what its name says, else the folder nearest to it that says one.

    Example:
      >>> split_of_file(PurePosixPath("train/x_test.csv")), split_of_file(PurePosixPath("train_sft-00000-of-00001.csv"))
      ('test', 'train_sft')
    """
    shard = _SHARD.match(path.name)
    if shard and shard[1] not in _WORDS and shard[1].partition("_")[0] in _WORDS:
        return shard[1]
    return next(filter(None, map(split_of, reversed(path.parts))), None)


def data_files(directory: Path, kinds: re.Pattern[str]) -> dict[PurePosixPath, Path]:
    """The data files of a directory by their paths in it, in order; no hidden ones, and none of `__pycache__`'s kind.

    Args:
      directory: to look through, with all that it holds.
      kinds: what a name must match.
    """
    files_by_name = {PurePosixPath(file.relative_to(directory).as_posix()): file for file in directory.rglob("*")}
    return {
        path: files_by_name[path]
        for path in sorted(files_by_name)
        if kinds.search(path.name)
        and path.name not in _ABOUT
        and not any(part.startswith((".", "__")) for part in path.parts)
        and files_by_name[path].is_file()
    }


def of_split(files: Collection[PurePosixPath], split: str) -> list[PurePosixPath]:
    """The files of a split, by their paths in a directory.

    They begin with its name, in a folder or a file, or have a word for it in theirs. Files that say no split are
    training data where none says that it is; one that says another split never is.

    Example:
      >>> paths = [PurePosixPath(name) for name in ("a_train.csv", "a_test.csv", "b.csv", "sft/dev.csv")]
      >>> [str(path) for path in of_split(paths, "train")], [str(path) for path in of_split(paths, "validation")]
      (['a_train.csv'], ['sft/dev.csv'])
    """
    begins = re.compile(rf"(^|/)({re.escape(split)})([-./]|_?\d)")
    exact = [path for path in files if begins.search(path.as_posix())]
    wanted = _WORDS.get(split)
    if wanted is None or (exact and split != wanted):
        return exact
    told = {path: split_of_file(path) for path in files}
    named = [path for path in files if told[path] == wanted]
    if named or wanted != TRAIN or not {VALIDATION, TEST, None}.issuperset(told.values()):
        return named
    return [path for path in files if told[path] is None]


def split_files(path: Path, split: str, kinds: re.Pattern[str], readable: str) -> list[Path]:
    """The file itself, or a directory's files of a split.

    Args:
      path: of a file or a directory.
      split: its name.
      kinds: what the name of a file that is read matches.
      readable: those kinds in words.

    Raises:
      UserError: there is none, or the file is of no kind that is read.
    """
    if path.is_file():
        if not kinds.search(path.name):
            raise UserError(f"{path}: expected a {readable} file")
        return [path]
    files = data_files(path, kinds)
    chosen = of_split(files, split)
    if not chosen:
        listing = ", ".join(map(str, [*files][:4])) or f"no {readable}"
        raise UserError(f"{path}: no file of the split {split!r}, found {listing}; name another split or a file")
    return [files[one] for one in chosen]


def left_out(path: Path, split: str, kinds: re.Pattern[str]) -> dict[str, str]:
    """The files of a directory that are not of a split, each with what its name says it is; none for a file."""
    files = data_files(path, kinds) if path.is_dir() else {}
    chosen = of_split(files, split)
    return {str(file): split_of_file(file) or "no split" for file in files if file not in chosen}
