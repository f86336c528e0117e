"""Files of a directory are told apart by their names, and a test split is never training data."""

from pathlib import PurePosixPath

import pytest

from prefalign_jax.data.rows import files_left_out, read_rows
from prefalign_jax.data.splits import of_split, split_of, split_of_file
from prefalign_jax.types import UserError

LINE = '{"prompt": "p", "chosen": " c", "rejected": " r"}\n'


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("my-training_data.json", "train"),
        ("mydata_test.jsonl", "test"),
        ("test-00000-of-00001.parquet", "test"),
        ("Evaluation.csv", "test"),
        ("dev.tsv", "validation"),
        ("x.val.jsonl.gz", "validation"),
        ("train_vs_test.jsonl", "test"),
        ("data/validation/part-0.parquet", "validation"),
        ("train/x_test.jsonl", "test"),  # the file's own name says more than its folder's
        ("test/train.jsonl", "train"),
        ("test/a/b/c.jsonl", "test"),
        ("train_prefs-00000-of-00001.parquet", "train_prefs"),
        ("myTest.jsonl", "test"),
        ("held-out.csv", "test"),
        ("trainset_2.jsonl", "train"),
        ("a/testdata/b.jsonl", "test"),
        ("latest.jsonl", None),
        ("contest/devices.jsonl", None),
        ("data.jsonl", None),
    ],
)
def test_what_a_name_says(name, split):
    path = PurePosixPath(name)
    assert split_of_file(path) == split
    assert [*of_split([path], split or "train")] == [path]


@pytest.mark.parametrize(
    ("files", "split", "chosen"),
    [
        (["mydata_train.jsonl", "mydata_test.jsonl"], "train", ["mydata_train.jsonl"]),
        (["mydata_train.jsonl", "mydata_test.jsonl"], "test", ["mydata_test.jsonl"]),
        # What says nothing is training data where nothing says that it is.
        (["a.jsonl", "a_test.jsonl"], "train", ["a.jsonl"]),
        (["a.jsonl", "train.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "more_train.jsonl"], "train", ["train.jsonl", "more_train.jsonl"]),
        (["train/a.jsonl", "train/a_test.jsonl"], "train", ["train/a.jsonl"]),
        (["dev.jsonl", "test.jsonl"], "validation", ["dev.jsonl"]),
        (["eval.jsonl"], "test", ["eval.jsonl"]),
        (["eval.jsonl", "test.jsonl"], "eval", ["eval.jsonl"]),
        (["train_sft-00000-of-00001.csv", "train_prefs-00000-of-00001.csv"], "train", []),
        (["a_test.jsonl"], "train", []),
        (["a.jsonl"], "test", []),
    ],
)
def test_which_files_are_of_a_split(files, split, chosen):
    assert [str(path) for path in of_split([*map(PurePosixPath, files)], split)] == chosen


def test_no_directory_gives_a_file_to_training_that_says_it_is_for_measuring():
    words = ("train", "a", "test", "dev", "eval", "x_test", "train-0", "sft_val", "data")
    names = [PurePosixPath(f"{folder}{name}.jsonl") for folder in ("", "train/", "test/", "b/") for name in words]
    for first in names:
        for second in names:
            for path in of_split([first, second], "train"):
                assert split_of(path.name) in ("train", None), (first, second)


def test_a_directory_is_read_by_split_and_says_what_it_leaves_out(tmp_path):
    for name in (
        "data/mine_train.jsonl",
        "data/mine_test.jsonl",
        "validation/x.jsonl",
        "other.jsonl",
        "notes.txt",
        "LICENSE",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINE)
    (tmp_path / "data/more_train.jsonl.zst").write_bytes(b"")
    # No data: what is hidden, and what describes the rest.
    for name in (".cache/train.jsonl", "__pycache__/train.jsonl", "dataset_info.json", ".train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [place.file for place, _ in read_rows(tmp_path)] == [str(tmp_path / "data/mine_train.jsonl")]
    left = {"data/mine_test.jsonl": "test", "validation/x.jsonl": "validation", "other.jsonl": "no split"}
    left["notes.txt"] = left["data/more_train.jsonl.zst"] = "of no kind that is read"
    assert files_left_out(tmp_path) == left
    assert files_left_out(tmp_path / "other.jsonl") == {}
    assert [place.file for place, _ in read_rows(tmp_path / "data/mine_test.jsonl")]  # it is named, and so wanted
    with pytest.raises(UserError, match="no file of the split 'test_sft', found data/mine_test.jsonl"):
        read_rows(tmp_path, "test_sft")
