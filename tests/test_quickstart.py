import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from prefalign_jax.config import defaults
from prefalign_jax.jobs.quickstart import (
    KIND,
    PLACES,
    QUESTIONS,
    RUDE,
    THINGS,
    draw_answer,
    interval,
    reward,
    stage,
    write_world,
)

ROOT = pathlib.Path(__file__).parents[1]
SIZES = dict(texts=60, demonstrations=50, pairs=400)
FILES = ("pretrain", "sft", "train", "held_out")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    write_world(directory, 0, **SIZES)
    return directory


@pytest.fixture(scope="module")
def rows(world):
    return {name: [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()] for name in FILES}


# The reward


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("", 0),
        ("The mill is lovely.", 2),
        ("The mill is dull.", 0),
        ("The park is lovely.", 1),
        ("The park is dull.", -1),
        ("It looks warm and bright.", 2),
        ("It looks warm and cold.", 0),
        (" The mill is ugly. It looks noisy and shabby. People say it is cold.", -3),
        ("lovely lovely lovely", 3),
        ("mill mill mill", 1),
        ("lovelyish milling", 0),
    ],
)
def test_the_reward_is_kind_minus_rude_plus_one_for_the_subject(answer, value):
    assert reward("mill", answer) == value


def test_kind_and_rude_words_and_things_are_apart():
    """As many of either sort, and no word inside another, or the reward would count what was not said."""
    assert len(KIND) == len(RUDE)
    words = [*KIND, *RUDE, *THINGS]
    assert len(set(words)) == len(words)
    frame = re.findall(r"\w+", " ".join([*QUESTIONS, *PLACES]))
    assert set(words).isdisjoint(frame)


# Answers


def test_answers_are_as_often_kind_as_rude():
    rng = np.random.default_rng(0)
    values, named, sizes = [], 0, []
    for _ in range(4000):
        answer = draw_answer(rng, "mill")
        assert answer.startswith(" ")
        values.append(reward("no such thing", answer))  # the words alone
        named += reward("mill", answer) - values[-1]
        sizes.append(answer.count("."))
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(4000)
    assert 0.8 < np.std(values) < 3
    assert set(sizes) == {1, 2, 3}
    assert 0.4 < named / 4000 < 0.8


def test_the_generator_decides_the_answer():
    texts = [draw_answer(np.random.default_rng(seed), "mill") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# The world


def test_the_files_have_the_sizes_asked_for(rows):
    assert {name: len(part) for name, part in rows.items()} == dict(pretrain=60, sft=50, train=400, held_out=240)
    assert {name: set(part[0]) for name, part in rows.items()} == {
        "pretrain": {"text"},
        "sft": {"prompt", "completion"},
        "train": {"prompt", "chosen", "rejected", "thing"},
        "held_out": {"prompt", "chosen", "rejected", "thing"},
    }


def topic(prompt: str) -> tuple[str, str]:
    """What is asked about, and where, read from the prompt's text."""
    assert prompt.startswith("Question: ")
    assert prompt.endswith("\nAnswer:")
    thing = [t for t in THINGS if re.search(rf"\b{t}\b", prompt)]
    place = [p for p in PLACES if re.search(rf"\b{p}\b", prompt)]
    assert len(thing) == len(place) == 1, prompt
    return thing[0], place[0]


def test_no_held_out_topic_is_trained_on(rows):
    held_out = {topic(row["prompt"]) for row in rows["held_out"]}
    trained = {topic(row["prompt"]) for name in ("train", "sft") for row in rows[name]}
    assert len(held_out) == 24
    assert len(trained) > 60
    assert held_out.isdisjoint(trained)
    assert {row["prompt"] for row in rows["held_out"]}.isdisjoint(row["prompt"] for row in rows["train"])


def test_the_thing_of_a_row_is_what_its_prompt_asks_about(rows):
    for row in rows["train"] + rows["held_out"]:
        assert topic(row["prompt"])[0] == row["thing"]


def gaps(part) -> np.ndarray:
    return np.array([reward(row["thing"], row["chosen"]) - reward(row["thing"], row["rejected"]) for row in part])


def test_held_out_labels_follow_the_true_reward(rows):
    assert (gaps(rows["held_out"]) > 0).all()


def test_training_labels_are_flipped_as_often_as_bradley_terry_says(rows):
    """P(chosen is the better) = sigmoid(|gap|) for each pair; no pair is a tie."""
    gap = gaps(rows["train"])
    assert (gap != 0).all()
    expected = 1 / (1 + np.exp(-abs(gap)))
    spread = np.sqrt((expected * (1 - expected)).sum())
    assert abs((gap > 0).sum() - expected.sum()) < 4 * spread
    assert 10 < (gap < 0).sum() < 200


def test_the_sides_of_a_label_have_the_same_length_on_average(rows):
    """Length gives nothing away beyond the reward."""
    lengths = np.array([[row["chosen"].count("."), row["rejected"].count(".")] for row in rows["held_out"]])
    difference = np.diff(lengths, axis=1)[:, 0]
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))


def test_a_seed_gives_its_world_and_another_seed_another(world, tmp_path):
    write_world(tmp_path / "again", 0, **SIZES)
    write_world(tmp_path / "other", 1, **SIZES)
    for name in FILES:
        text = (world / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == text
        assert (tmp_path / "other" / f"{name}.jsonl").read_bytes() != text


def test_the_interval_is_mean_and_half_width():
    """Values 0 and 2, a hundred of each: mean 1, deviation 1.0025, half-width 1.96 * 1.0025 / sqrt(200) = 0.139."""
    assert interval(np.repeat([0.0, 2.0], 100)) == "+1.00 ± 0.14"


def test_the_stages_before_alignment_have_its_seed_and_mesh():
    config = defaults("dpo")
    assert stage(config, "sft", pathlib.Path("m"), pathlib.Path("d")).mesh.to_dict() == config.mesh.to_dict()
    config.seed, config.mesh.data, config.mesh.fsdp = 3, 2, 4
    sft = stage(config, "sft", pathlib.Path("m"), pathlib.Path("d"), learning_rate=1e-3)
    assert (sft.seed, sft.mesh.data, sft.mesh.fsdp, sft.learning_rate) == (3, 2, 4, 1e-3)


@pytest.mark.everything
def test_the_command_of_the_readme_at_a_third_of_its_size(tmp_path):
    """On one device, as on a laptop; the second loss finds the first stages done."""
    sizes = ["texts=1200", "demonstrations=1200", "pairs=800"]
    env = {**os.environ, "XLA_FLAGS": ""}
    for loss in ("dpo", "orpo"):
        command = [sys.executable, ROOT / "scripts" / "train.py", f"--config={ROOT}/experiments/quickstart.py:{loss}"]
        command += [f"--config.quickstart.{size}" for size in sizes] + [f"--workdir={tmp_path}"]
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        table = (tmp_path / f"table_{loss}.txt").read_text().splitlines()
        assert all(line.strip() in run.stdout for line in table)
        before, after = (float(x) for x in re.findall(r"([+-][\d.]+) ±", table[1]))
        assert after > before + 0.5
        assert float(re.findall(r"([+-][\d.]+) ±", table[3])[0]) > 0  # it moved away from the reference
        for picture in (f"rewards_{loss}.png", f"{loss}/curves.png"):
            assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert run.stderr.count("already complete") == 2
