"""The embedded demonstration: a small world with a known true reward, from no files at all to an aligned model.

A corpus of questions about a town and answers in friendly or unfriendly words is generated; a tokenizer and a small
Llama-shaped model are trained on it; preference pairs are labelled by the true reward with Bradley-Terry noise; and the
model is aligned on them. Because the reward is known, the improvement can be measured, on prompts never trained on.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import jax
import matplotlib.figure
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prefalign_jax import processes, tables
from prefalign_jax.config import defaults
from prefalign_jax.evaluation.held_out import sequence_log_ratios
from prefalign_jax.files import read_json_lines, write_json, write_text
from prefalign_jax.generation.generate import sample
from prefalign_jax.models.decoder import DecoderConfig
from prefalign_jax.models.families import to_hf
from prefalign_jax.pages.palette import PALETTE
from prefalign_jax.pages.pictures import styled
from prefalign_jax.processes import note
from prefalign_jax.torch_free import tokenizer_library
from prefalign_jax.train import Result, train
from prefalign_jax.types import Pair, UserError

THINGS = (
    "bakery bridge castle garden harbour library market mill museum orchard park river school station tower".split()
)
PLACES = [
    "at dawn",
    "in spring",
    "in the rain",
    "by the sea",
    "on the hill",
    "in the old town",
    "after dark",
    "in winter",
]
QUESTIONS = [
    "What is the {thing} {place} like?",
    "Tell me about the {thing} {place}.",
    "Should I see the {thing} {place}?",
]
KIND = "lovely warm bright peaceful charming clean pretty welcoming".split()
RUDE = "ugly cold dull noisy shabby dirty dreary unfriendly".split()
SENTENCES = ["The {thing} is {a}.", "It looks {a} and {b}.", "People say it is {a}.", "You will find the {thing} {a}."]


def reward(thing: str, answer: str) -> float:
    """The true reward: kind words minus rude words, plus 1 if the answer names what was asked about."""
    words = [word.strip(".") for word in answer.split()]
    return sum(w in KIND for w in words) - sum(w in RUDE for w in words) + float(thing in words)


def draw_answer(rng: np.random.Generator, thing: str) -> str:
    """An answer of one to three sentences, as often kind as rude, now and then about the wrong thing."""
    subject = thing if rng.random() < 0.8 else str(rng.choice(THINGS))
    parts = []
    for sentence in rng.choice(SENTENCES, rng.integers(1, 4), replace=False):
        a, b = rng.choice(KIND + RUDE, 2, replace=False)
        parts.append(sentence.format(thing=subject, a=a, b=b))
    return " " + " ".join(parts)


def write_world(directory: Path, seed: int, *, texts: int, demonstrations: int, pairs: int) -> None:
    """Writes pretrain.jsonl, sft.jsonl, train.jsonl (noisy labels) and held_out.jsonl (other prompts, true labels)."""
    rng = np.random.default_rng(seed)
    topics = [(thing, place) for thing in THINGS for place in PLACES]
    rng.shuffle(topics)
    held_out, trained = topics[:24], topics[24:]

    def ask(topic) -> tuple[str, str]:
        thing, place = topic
        return thing, "Question: " + str(rng.choice(QUESTIONS)).format(thing=thing, place=place) + "\nAnswer:"

    def pair(topic, noise: bool) -> dict:
        thing, prompt = ask(topic)
        while True:
            answers = [draw_answer(rng, thing) for _ in range(2)]
            gap = reward(thing, answers[0]) - reward(thing, answers[1])
            if gap:
                break
        first = rng.random() < 1 / (1 + np.exp(-gap)) if noise else gap > 0
        chosen, rejected = answers if first else answers[::-1]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "thing": thing}

    def pick():
        return trained[rng.integers(len(trained))]

    files = {
        "pretrain": [{"text": draw_answer(rng, str(rng.choice(THINGS))).strip()} for _ in range(texts)],
        "sft": [{"prompt": (q := ask(pick()))[1], "completion": draw_answer(rng, q[0])} for _ in range(demonstrations)],
        "train": [pair(pick(), noise=True) for _ in range(pairs)],
        "held_out": [pair(topic, noise=False) for topic in held_out for _ in range(10)],
    }
    for name, rows in files.items():
        write_text(directory / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write_base(directory: Path, texts: list[str], shape: ConfigDict) -> None:
    """Trains a byte-level BPE tokenizer on the texts and writes it with an untrained model's config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    whole = tokenizer_library().PreTrainedTokenizerFast
    whole(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1]).save_pretrained(directory)
    config = DecoderConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.heads // 2,
        head_dim=shape.hidden // shape.heads,
        tie_embeddings=True,
        max_position=256,
    )
    write_json(directory / "config.json", to_hf(config))


def stage(config: ConfigDict, loss: str, model: Path, data: Path, **fields) -> ConfigDict:
    """A training config for one of the stages before alignment, with the quickstart's seed, mesh and type."""
    c = defaults(loss)
    c.update(
        {"seed": config.seed, "mesh": config.mesh.to_dict(), "dtype": config.dtype, "batch_size": 32, "max_length": 128}
    )
    c.model.path, c.data.path = str(model), str(data)
    c.update(fields)
    return c


def measure(result: Result, questions: list[dict], seed: int) -> tuple[np.ndarray, list[Pair], list[str]]:
    """Samples an answer to every question: (true rewards, the samples as pairs without a rejected side, the texts)."""
    tokenizer = result.tokenizer
    prompts = [np.array(tokenizer(q["prompt"]).input_ids, np.int32) for q in questions]
    options = dict(seed=seed, max_new_tokens=56, stop_tokens=[tokenizer.eos_token_id], batch_size=256)
    drawn = [samples[0].tokens for samples in sample(result.model, result.params, prompts, **options)]
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    rewards = np.array([reward(q["thing"], text) for q, text in zip(questions, texts, strict=True)])
    empty = np.zeros(0, np.int32)
    return rewards, [Pair(prompt, ids, empty) for prompt, ids in zip(prompts, drawn, strict=True)], texts


def interval(values: np.ndarray) -> str:
    """Mean and half-width of its normal 95% interval."""
    return f"{values.mean():+.2f} ± {1.96 * values.std(ddof=1) / np.sqrt(len(values)):.2f}"


def run(config: ConfigDict, workdir: Path) -> int:
    """The demonstration from start to table.

    Args:
      config: experiments/quickstart.py's.
      workdir: gets data/, base/, pretrain/, sft/, one named after the loss, and the table and plots.

    Returns:
      The exit status: 0, or processes.STOPPED if a stage was told to stop.
    """
    if jax.process_count() > 1:
        raise UserError("the quickstart runs in one process, which may see several devices")
    began = time.monotonic()
    data, base = workdir / "data", workdir / "base"
    shape = config.quickstart
    note("1/4 generating a corpus with a known reward, and a tokenizer")
    write_world(data, config.seed, texts=shape.texts, demonstrations=shape.demonstrations, pairs=shape.pairs)
    rows = [row for name in ("pretrain", "sft") for row in read_json_lines(data / f"{name}.jsonl")]
    texts = [" ".join(map(str, row.values())) for row in rows]
    write_base(base, texts, shape)

    note("2/4 pretraining on plain text")
    pretrain = stage(
        config, "sft", base, data / "pretrain.jsonl", learning_rate=3e-3, warmup_steps=20, schedule="cosine"
    )
    pretrain.model.random_init = True
    if train(pretrain, workdir / "pretrain").stopped:
        return processes.STOPPED
    note("3/4 fine-tuning on questions and answers")
    sft = stage(
        config, "sft", workdir / "pretrain" / "export", data / "sft.jsonl", learning_rate=2e-3, schedule="cosine"
    )
    before = train(sft, workdir / "sft")
    if before.stopped:
        return processes.STOPPED

    note(f"4/4 aligning with {config.loss.name.upper()}")
    align = copy.deepcopy(config)
    align.job = "train"
    align.model.path = str(workdir / "sft" / "export")
    align.data.path, align.data.eval_path = str(data / "train.jsonl"), str(data / "held_out.jsonl")
    name = config.loss.name
    after = train(align, workdir / name)
    if after.stopped:
        return processes.STOPPED

    questions = read_json_lines(data / "held_out.jsonl")
    old_rewards, _, old_texts = measure(before, questions, config.seed)
    new_rewards, samples, new_texts = measure(after, questions, config.seed)
    kl = sequence_log_ratios((after.model, after.params), (before.model, before.params), samples)

    accuracy = [after.after[f"eval/rewards/accuracies{end}"] for end in ("", "_low", "_high")]
    rows = [
        ("held-out prompts", "before (SFT)", f"after ({config.loss.name.upper()})"),
        ("true reward of sampled answers", interval(old_rewards), interval(new_rewards)),
        ("reward accuracy on held-out pairs", "-", "{:.3f} [{:.3f}, {:.3f}]".format(*accuracy)),
        ("KL to the reference, nats per answer", "0", interval(kl)),
    ]
    table = tables.aligned(rows[0], rows[1:])
    write_text(workdir / f"table_{name}.txt", table + "\n")
    plot_rewards(workdir / f"rewards_{name}.png", old_rewards, new_rewards)
    print(f"\n{table}\n\n{questions[0]['prompt']}\n  before:{old_texts[0]}\n  after: {new_texts[0]}\n")
    aligned = workdir / name
    print(f"plots: {workdir / f'rewards_{name}.png'}, {aligned / 'curves.png'}; model: {aligned / 'export'}")
    print(f"{time.monotonic() - began:.0f} s on {jax.device_count()} {jax.default_backend()} device(s)")
    return 0


@styled
def plot_rewards(path: Path, before: np.ndarray, after: np.ndarray) -> None:
    """Histogram of the true reward of sampled answers, before and after."""
    figure = matplotlib.figure.Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    edges = np.arange(min(before.min(), after.min()) - 0.5, max(before.max(), after.max()) + 1.5)
    for values, label, colour in ((before, "before", PALETTE["blue"]), (after, "after", PALETTE["vermillion"])):
        axes.hist(values, edges, alpha=0.6, label=f"{label}, mean {values.mean():+.2f}", color=colour)
    axes.set_xlabel("true reward of an answer to a held-out prompt")
    axes.set_ylabel("answers")
    axes.legend()
    figure.savefig(path)
