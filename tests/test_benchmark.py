"""scripts/benchmark.py measures what it says."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmark import BENCHMARKS
from benchmarks import decoding, inputs, measuring, members, peers, pipeline, prefix_sharing, step_cost
from benchmarks.measuring import run
from prefalign_jax.exits import status_of
from prefalign_jax.models import families, hf_io
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is read from /proc")


@pytest.mark.everything
def test_import_of_a_tiny_model(tmp_path, capsys):
    out, kept = tmp_path / "deep" / "found.json", tmp_path / "model"
    command = ["import", "--params=1e5", "--quantize=nf4", "--devices=2", f"--keep={kept}", f"--out={out}"]
    assert status_of(lambda: run(BENCHMARKS, command)) == 0
    table, written = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert written["benchmark"] == "import" and written["options"]["quantize"] == "nf4"
    assert "jax" in written["made by"] and [path.name for path in out.parent.iterdir()] == [out.name]
    found = written["found"]
    assert table[0] == "import" and [line[2:].split("  ")[0] for line in table[1:]] == list(found)
    config = inputs.shape_of(1e5)
    shapes = dict(inputs.llama_tensors(config))
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert found["parameters, millions"] == pytest.approx(count / 1e6)
    assert found["largest tensor, GiB"] == pytest.approx(2 * max(map(np.prod, shapes.values())) / 2**30)
    bytes_ = found["parameters, GiB"] * 2**30
    kernels = sum(int(np.prod(shape)) for name, shape in shapes.items() if "_proj" in name)
    # Half a byte for a quantized weight, 4 for 64 of them, two for any other; norms and some scales are on both.
    assert 0.5625 * kernels + 2 * (count - kernels) == pytest.approx(bytes_, rel=0.05)
    assert found["seconds"] > 0 and found["beyond <= largest tensor + 1 GiB"] is True
    assert 0.02 < found["anonymous memory before, GiB"] < found["peak anonymous memory beyond the parameters, GiB"] < 1
    assert found["peak file-backed memory, GiB"] > 0.01
    assert len(list(kept.glob("model-*.safetensors"))) > 2
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    inputs.write_checkpoint(kept, config, shapes)  # made once
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == before


def test_the_model_is_about_as_large_as_asked_and_one_that_load_params_knows():
    for params in (1e9, 7e9):
        config = inputs.shape_of(params)
        tensors = dict(inputs.llama_tensors(config))
        assert sum(int(np.prod(shape)) for shape in tensors.values()) == pytest.approx(params, rel=0.1)
        shapes = hf_io.param_shapes(config)
        wanted = {}
        for name, (row,), layer in families.weights(config):
            shape = shapes[row.path][layer is not None :]
            wanted[name] = shape[::-1] if row.transpose else shape
        assert tensors == wanted


def test_memory_that_a_process_holds_is_seen_by_its_kind(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(bytes(32 << 20))
    hold = (
        "import mmap, sys; a = bytearray(b'x') * (48 << 20); f = open(sys.argv[1], 'rb'); "
        "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); s = sum(m[::4096]); print(flush=True); sys.stdin.read()"
    )
    found = []
    for code in ("print(flush=True); import sys; sys.stdin.read()", hold):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            child.stdout.readline()
            found.append(measuring.resident(child.pid))
            child.stdin.close()
    anonymous, mapped = np.subtract(*found[::-1]) / 2**20
    assert 47 < anonymous < 60 and 31 < mapped < 40


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("import --params=1e5", "--out must be given"),
        ("imports --out=x.json", "benchmark='imports' is unknown; did you mean 'import'?"),
        ("import --params=many --out=x.json", "--params: invalid float value: 'many'"),
        ("import --dtype=bf16 --out=x.json", "--dtype='bf16' is unknown; did you mean 'bfloat16'?"),
        ("import --quantize=int4 --out=x.json", "--quantize='int4' is unknown; did you mean 'int8'?"),
        ("import --params=-1 --out=x.json", "must be positive"),
        ("import --par=1e5 --out=x.json", "--par: no such option; did you mean '--params'?"),
        ("import --keep=other --out=x.json", "--keep=other holds another model"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    assert status_of(lambda: run(BENCHMARKS, words.split())) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and not (tmp_path / "x.json").exists()


@pytest.mark.everything
@pytest.mark.parity
def test_decoding_beside_transformers(tmp_path):
    pytest.importorskip("torch")
    model = DecoderConfig(61, 16, 32, 2, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.4)
    hf_io.save_params(make_decoder(model).init(jax.random.key(0)), model, tmp_path / "model")
    found = decoding.decode(model=str(tmp_path / "model"), rows="1,3", prompt=4, new_tokens=5, rounds=1)
    for count in (1, 3):
        ours, theirs = (found[f"{who}, {count} rows, tokens/s"] for who in ("ours", "transformers"))
        assert found[f"ratio, {count} rows"] == pytest.approx(ours / theirs)
        assert found[f"same tokens, {count} rows"] == 1.0
    with pytest.raises(UserError, match="must be positive"):
        decoding.decode(rows="0")


@pytest.mark.everything
@pytest.mark.parametrize("lora", [0, 2])
def test_members_beside_one_run(lora):
    found = members.members(shape="tiny", members=2, lora=lora, lengths="8+4")
    assert found["members"] == 2 and found["together, s a step"] > 0
    assert found["times as fast as one after the other"] == pytest.approx(
        2 * found["alone, s a step"] / found["together, s a step"]
    )
    with pytest.raises(UserError, match="must be positive"):
        members.members(shape="tiny", members=0)


# Steps beside a peer's

TINY = ["--shape=tiny", "--pairs=2", "--steps=3", "--rounds=1"]


@pytest.mark.everything
def test_a_step_beside_one_with_a_cached_reference(tmp_path, capsys):
    out = tmp_path / "found.json"
    assert status_of(lambda: run(BENCHMARKS, ["train", "--peer=cached", "--lengths=20+12", *TINY, f"--out={out}"])) == 0
    found = json.loads(out.read_text())["found"]
    assert found["ours, s a step"] > 0 and found["largest difference of a loss"] < 1e-5
    times = found["cached, s a step"] / found["ours, s a step"]
    assert found["times as fast"] == pytest.approx(times) and "1: " in capsys.readouterr().err
    # Two pairs of 20 + 2 (12 - 1) tokens in one row of 128.
    assert found["ours, padding, share of positions"] == pytest.approx(1 - 2 * 42 / 128)
    assert found["ours, programs compiled"] >= 1 and found["ours, share of this machine's matmul rate"] < 1


@pytest.mark.everything
@pytest.mark.parametrize(
    "how",
    [dict(param_dtype="bfloat16"), dict(lora=4, remat="full", peer_remat="full")],
    ids=["all weights", "LoRA"],
)
def test_the_way_to_a_gpu_on_a_cpu(monkeypatch, how):
    monkeypatch.setitem(peers.PLATFORMS, "gpu", "cpu")
    options = dict(device="gpu", dtype="bfloat16", shape="tiny", lengths="20+12", pairs=2, steps=3, rounds=1)
    found = peers.train(peer="cached", **options, **how)
    assert found["ours, share of this machine's matmul rate"] > 0 and found["ours, peak memory, GiB"] > 0
    assert found["largest difference of a loss"] < 1e-2


@pytest.mark.everything
def test_ours_alone_from_weights_that_are_kept(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    options = dict(peer="none", shape="tiny", lengths="20+12", pairs=2, steps=2, rounds=1, keep=str(kept))
    found = peers.train(**options)
    assert found["ours, s a step"] > 0 and not any("peer" in name or "times" in name for name in found)
    assert {path.name for path in kept.iterdir()} == {"tiny-float32", "2x2-512-512-20+12.json"}
    monkeypatch.setattr(peers, "random_params", lambda *args: pytest.fail("the weights are there"))
    monkeypatch.setattr(peers, "side", lambda python, name, spec, device: script_spec.update(spec) or {})
    monkeypatch.setattr(peers, "comparison", lambda *args: {})
    script_spec = {}
    peers.train(**options, attention="tiles")
    assert script_spec["attention"] == "tiles" and script_spec["model"] == str(kept / "tiny-float32")


def test_steps_that_compile_do_not_count():
    ours = {"seconds": [9.0, 1.0, 8.0, 3.0], "cold": [True, False, True, False]}
    assert peers.warm(ours, "seconds").tolist() == [1.0, 3.0]
    assert peers.ratio_of({"ours": ours, "trl": {"seconds": [9.0, 4.0, 8.0, 12.0]}}, "trl") == 4.0
    with pytest.raises(UserError, match="write more --steps"):
        peers.warm(ours | {"cold": [True] * 4}, "seconds")


def test_random_weights_are_distributed_as_the_decoder_draws_them():
    config = inputs.SHAPES["tiny"]
    ours, drawn = inputs.random_params(config, "float32"), make_decoder(config).init(jax.random.key(0))
    assert jax.tree.map(jax.numpy.shape, ours) == jax.tree.map(jax.numpy.shape, drawn)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(drawn), strict=True):
        assert float(np.std(one)) == pytest.approx(float(np.std(other)), rel=0.1)


def test_losses_that_differ_are_not_compared(tmp_path, monkeypatch):
    measured = iter([[0.69, 0.68], [0.69, 0.66]])
    monkeypatch.setattr(peers, "side", lambda *_: {"losses": next(measured), "chosen_logps": -50.0, "device": "cpu"})
    with pytest.raises(UserError, match="the first losses differ, so nothing is compared"):
        peers.train(peer="trl", shape="tiny", lengths="8+8", pairs=2)


def test_other_weights_are_noticed_though_dpo_starts_at_log_2(monkeypatch):
    measured = iter([-50.0, -52.0])
    of_a_side = {"losses": [0.69, 0.69], "device": "cpu"}
    monkeypatch.setattr(peers, "side", lambda *_: of_a_side | {"chosen_logps": next(measured)})
    with pytest.raises(UserError, match="ours .* at -50.0, trl .* at -52.0"):
        peers.train(peer="trl", shape="tiny", lengths="8+8", pairs=2)


def test_a_gpu_is_not_compared_with_a_cpu():
    one = {"losses": [0.69, 0.69], "chosen_logps": -50.0, "device": "NVIDIA H200"}
    peers.refuse_others({"ours": one, "trl": one}, "float32")
    with pytest.raises(UserError, match="different devices"):
        peers.refuse_others({"ours": one, "trl": one | {"device": "cpu"}}, "float32")


def test_files_of_one_name_are_not_taken_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "side", lambda python, name, spec, device: seen.append(spec["pairs"]) or {})
    monkeypatch.setattr(peers, "comparison", lambda *args: {})
    monkeypatch.setattr(peers, "pairs_for", lambda *args: {})
    monkeypatch.setattr(peers, "random_params", lambda *args: {})
    monkeypatch.setattr(peers.hf_io, "save_params", lambda *args, **options: None)
    (tmp_path / "kept").mkdir()
    seen = []
    for folder, shape in (("a", "tiny"), ("b", "tiny"), ("a", "smollm2-135m"), ("a", "tiny")):
        file = tmp_path / folder / "pairs.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(folder)
        peers.train(peer="none", shape=shape, lengths=str(file), keep=str(tmp_path / "kept"), rounds=1)
    assert len(set(seen)) == 3 and seen[0] == seen[3]
    peers.train(peer="none", shape="tiny", lengths=str(tmp_path / "a"), keep=str(tmp_path / "kept"), rounds=1)
    assert pathlib.Path(seen[4]).parent == tmp_path / "kept" and seen[4] not in seen[:4]  # a directory of files


@pytest.mark.parametrize(
    "options",
    [{"peer": "tunix", "loss": "orpo"}, {"peer": "tunix", "lora": 8}, {"peer": "cached", "loss": "orpo"}, {"steps": 1}]
    + [{"peer": "easydel", "lora": 8}, {"peer": "easydel", "dtype": "bfloat16"}, {"peer": "verl"}, {"shape": "huge"}]
    + [{"reference": "cached"}, {"reference": "cache"}, {"peer_remat": "ful"}, {"peer_head": "fused"}]
    + [{"peer": "none", "python": "python9"}],
)
def test_what_cannot_be_compared_is_refused(options):
    with pytest.raises(UserError, match="--"):
        peers.train(**options)


def test_pairs_of_a_file_are_tokenized_dealt_and_ended(tmp_path):
    rows = [{"prompt": "word " * (1 + n % 9), "chosen": "yes " * (1 + n % 5), "rejected": f"no {n}"} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = inputs.pairs_for(str(tmp_path / "pairs.jsonl"), 300, 4, 2, 60)
    assert {len(side) for side in found.values()} == {24}
    assert all(ids[-1] == inputs.EOS for name in ("chosen", "rejected") for ids in found[name])
    loads = [sum(len(found[name][i]) for name in found for i in range(b, b + 4)) for b in range(0, 24, 4)]
    assert max(loads) < 1.3 * min(loads)
    with pytest.raises(UserError, match="are not enough"):
        inputs.pairs_for(str(tmp_path / "pairs.jsonl"), 300, 4, 7, 60)


@pytest.mark.everything
def test_packing_on_one_core(tmp_path):
    rows = [{"prompt": "word " * (1 + n % 9), "chosen": "yes " * (1 + n % 5), "rejected": f"no {n}"} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pipeline.pack(data=str(tmp_path / "pairs.jsonl"), vocabulary=300, max_length=60, pairs="4")
    assert found["pairs"] == 24 and found["4 pairs: packed, pairs/s"] > 0
    assert 0 <= found["4 pairs: padding, share of positions"] < 0.5


def test_a_width_without_whole_heads_is_refused():
    for width in (0, 32, 96):
        with pytest.raises(UserError, match=f"width={width} is out of range; write a multiple of 64"):
            step_cost.cost(width=width)


@pytest.mark.everything
def test_what_is_doubled_costs_more_operations():
    found = step_cost.cost(tokens=16, vocabulary=512, layers=1, width=64, pairs=2, steps=2)
    assert found["layers x 2: operations x"] < 2 and found["layers x 2: time x"] > 0
    assert 1.2 < found["pairs x 2: operations x"] <= 2.5  # rows are multiples of 64 tokens


@pytest.mark.everything
@pytest.mark.parity
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_trl_and_ours_start_with_the_same_losses(loss):
    pytest.importorskip("trl")
    found = peers.train(peer="trl", loss=loss, lengths="12+8", shape="tiny", pairs=2, steps=3, rounds=1)
    assert found["largest difference of a loss"] < 1e-4


def test_data_gives_the_same_batches_made_and_cached(tmp_path):
    file = tmp_path / "40.jsonl"
    inputs.write_pairs(tmp_path, file, 40)
    before = file.read_bytes()
    made, cached = (pipeline.data_step(str(file), 512, made, 1) for made in (True, False))
    assert made["pairs"] == cached["pairs"] == 40 and made["tokens, millions"] == cached["tokens, millions"] > 0
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1
    for found in (made, cached):
        assert 0 < found["seconds to the pairs"] < found["seconds to the first batch"]
        assert found["processor seconds to it"] > 0 and found["pairs a second after it"] > 0
    inputs.write_pairs(tmp_path, file, 40)  # made once
    assert file.read_bytes() == before
    with pytest.raises(UserError, match="--pairs=3 must be at least 16"):
        pipeline.data(pairs=3)


@pytest.mark.everything
def test_tokenizing_beside_another_checkout_takes_turns_and_compares_the_tokens(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hi", "chosen": " you", "rejected": " no"}\n' * 3)
    words = [f"--other={ROOT}", f"--data={tmp_path / 'pairs.jsonl'}", f"--tokenizer={ROOT / 'tests/goldens/trl'}"]
    command = ["tokenize", *words, "--rounds=1", f"--out={tmp_path / 'out.json'}"]
    assert status_of(lambda: run(BENCHMARKS, command)) == 0
    found = json.loads((tmp_path / "out.json").read_text())["found"]
    assert found["pairs"] == 3 and found["same tokens"] is True and found["tokenize, ratio"] > 0


# A shared prompt at published lengths


@pytest.mark.parametrize("name", prefix_sharing.PUBLISHED)
def test_drawn_lengths_have_the_published_medians(name):
    published = prefix_sharing.PUBLISHED[name]
    drawn = prefix_sharing.drawn_lengths(published, 4096)
    prompts, responses = drawn[:, :1], drawn[:, 1:]
    assert drawn.shape == (4096, 3) and drawn.min() >= 2
    assert np.median(prompts + responses) == pytest.approx(published.length, abs=1)
    assert np.median(prompts / responses) == pytest.approx(published.ratio, rel=0.03)
    over_median = np.log(prompts / np.median(prompts))
    assert over_median.std() == pytest.approx(published.spread[0], rel=0.1)
    assert over_median.max() < 1.645 * published.spread[0] + 0.2


def test_tokens_of_each_layout_are_counted_by_hand():
    lengths = np.array(
        [[4, 2, 3], [1, 5, 1]]
    )  # of prompt, chosen and rejected; nothing follows a response's last token
    tokens = [prefix_sharing.tokens_in(lengths, layout) for layout in prefix_sharing.LAYOUTS]
    assert tokens == [(4 + 1 + 2) + (1 + 4 + 0), (5 + 6) + (5 + 1), 4 * (7 - 1)]


def test_published_ratios_are_those_of_the_paper():
    rates = prefix_sharing.PUBLISHED.values()
    over_packed = [round(one.shared / one.packed, 2) for one in rates]
    assert over_packed == [1.35, 1.17, 1.48, 1.34, 1.41, 1.57]
    assert round(prefix_sharing.PUBLISHED["hh-rlhf"].shared / prefix_sharing.PUBLISHED["hh-rlhf"].padded, 1) == 4.6


def test_layouts_of_the_same_pairs_are_timed_in_turn(monkeypatch):
    seen = []
    monkeypatch.setattr(prefix_sharing, "refuse_others", seen.append)
    lengths = np.array([[4, 2, 3], [1, 5, 1]])
    seconds = prefix_sharing.seconds_of(lengths, 2, vocabulary=64, layers=1, width=64)
    assert seconds.shape == (2, len(prefix_sharing.LAYOUTS)) and seconds.min() > 0
    assert np.shape(seen) == (2, 3, 2) and np.max(seen) < 0
    np.testing.assert_allclose(seen, np.broadcast_to(seen[0][0], (2, 3, 2)), rtol=1e-5)


@pytest.mark.everything
def test_layouts_of_the_same_pairs_are_timed_and_give_the_same_log_probabilities(tmp_path):
    tiny = ["--pairs=2", "--batches=3", "--shorter=32", "--vocabulary=64", "--layers=1", "--width=64", "--steps=2"]
    command = ["prefix", "--sets=tldr,hh-rlhf", *tiny, f"--out={tmp_path / 'out.json'}"]
    assert status_of(lambda: run(BENCHMARKS, command)) == 0
    found = json.loads((tmp_path / "out.json").read_text())["found"]
    assert len(found) == 2 * 19 and all(value > 0 for value in found.values())
    for name in ("tldr", "hh-rlhf"):
        tree, packed, padded = (found[f"{name}: tokens a pair, {layout}"] for layout in prefix_sharing.LAYOUTS)
        assert tree < packed < padded and found[f"{name}: tokens, padded over tree"] == pytest.approx(padded / tree)
        times = [found[f"{name}: s a step, {layout}"] for layout in prefix_sharing.LAYOUTS]
        assert found[f"{name}: time, packed over tree"] == pytest.approx(times[1] / times[0])


def test_layouts_that_give_different_log_probabilities_are_not_compared():
    prefix_sharing.refuse_others([[-50.0, -60.0], [-50.001, -60.001], [-50.0, -60.0]])
    with pytest.raises(UserError, match=r"padded \[-50.0, -61.0\]"):
        prefix_sharing.refuse_others([[-50.0, -60.0], [-50.0, -60.0], [-50.0, -61.0]])


@pytest.mark.parametrize("options", [{"sets": "tldr,hh"}, {"steps": 1}, {"pairs": 0}, {"width": 96}])
def test_an_option_of_prefix_that_makes_no_sense_is_refused(options):
    with pytest.raises(UserError, match="--"):
        prefix_sharing.prefix(**options)
