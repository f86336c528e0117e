import io
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.data.pipeline import make_pair_set
from prefalign_jax.data.trees import Layout
from prefalign_jax.files import sealed
from prefalign_jax.logps import preference_logps
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.reference import cache_key, cached, compute, params_digest
from prefalign_jax.types import Pair, PairLogps
from small import CONFIG, MODEL, first, make_pairs, make_params, packed

PARAMS = make_params(0)
PAIRS = make_pairs(7)
LOGPS = PairLogps(*np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32))
NAMES = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")


def one_shape(data):
    """The same set with the largest of its shapes only: one program."""
    return data._replace(shapes=data.shapes[-1:])


# compute


def test_compute_equals_one_pair_at_a_time():
    """Seven pairs in batches of three: the last batch holds one pair and two fillers."""
    done = []
    found = compute(MODEL, PARAMS, one_shape(make_pair_set(PAIRS, 3)), progress=done.append)
    alone = jax.jit(lambda batch: preference_logps(MODEL, PARAMS, batch))
    shape = packed(PAIRS[:1]).tokens.shape
    for number, pair in enumerate(PAIRS):
        batch = first(packed([pair]))
        assert batch.tokens.shape == shape[1:]
        expected = alone(batch)
        for name in NAMES:
            value = getattr(found, name)[number]
            np.testing.assert_allclose(value, getattr(expected, name)[0], rtol=1e-5, atol=1e-5, err_msg=name)
    assert found.chosen_tokens.tolist() == [len(pair.chosen) for pair in PAIRS]
    assert found.rejected_tokens.tolist() == [len(pair.rejected) for pair in PAIRS]
    assert done == [3, 6, 7]
    assert {getattr(found, name).dtype for name in NAMES} == {np.dtype(np.float32)}
    assert found.prompt is None


def test_without_a_rejected_side_its_logps_are_zero():
    found = compute(MODEL, PARAMS, one_shape(make_pair_set(PAIRS, 4, layout=Layout(rejected=False))))
    assert not found.rejected.any()
    assert not found.rejected_tokens.any()
    assert (found.chosen < 0).all()


# The key


def moved(pairs, number: int, **roles) -> list[Pair]:
    pair = pairs[number]
    return [*pairs[:number], Pair(**({n: getattr(pair, n) for n in ("prompt", "chosen", "rejected")} | roles))]


def key(model=MODEL, params=PARAMS, pairs=PAIRS, dtype="float32"):
    return cache_key(model, params_digest(params), pairs, dtype)


def test_the_key_changes_with_all_that_changes_a_number():
    last = PAIRS[-1]
    both = np.concatenate([last.prompt, last.chosen])
    bumped = jax.tree.map(lambda x: x, PARAMS)
    bumped["final_norm"]["scale"] = bumped["final_norm"]["scale"].at[3].add(1e-6)
    swapped = jax.tree.map(lambda x: x, PARAMS)
    attention = swapped["layers"]["attention"]
    attention["k"], attention["v"] = attention["v"], attention["k"]
    keys = {
        "same": key(),
        "a weight": key(params=bumped),
        "another seed of the weights": key(params=make_params(1)),
        "two arrays swapped": key(params=swapped),
        "type of the weights": key(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)),
        "compute type": key(dtype="bfloat16"),
        "shape of the model": key(model=make_decoder(CONFIG.__class__(**(vars(CONFIG) | {"rope_theta": 5e5})))),
        "a prompt token": key(pairs=moved(PAIRS, 6, prompt=np.append(last.prompt[:-1], 60))),
        "a chosen token": key(pairs=moved(PAIRS, 6, chosen=np.append(last.chosen[:-1], 60))),
        "a rejected token": key(pairs=moved(PAIRS, 6, rejected=np.append(last.rejected[:-1], 60))),
        "a longer chosen": key(pairs=moved(PAIRS, 6, chosen=np.append(last.chosen, 60))),
        "prompt | chosen": key(pairs=moved(PAIRS, 6, prompt=both[:1], chosen=both[1:])),
        "sides swapped": key(pairs=moved(PAIRS, 6, chosen=last.rejected, rejected=last.chosen)),
        "a pair less": key(pairs=PAIRS[:-1]),
        "order": key(pairs=PAIRS[::-1]),
    }
    assert len(both) > 2
    assert len(set(keys.values())) == len(keys), keys


def test_the_key_does_not_change_with_what_changes_no_number():
    """Not with the storage of the weights, the layout of their tree or where they lie."""
    reordered = {name: PARAMS[name] for name in reversed(PARAMS)}
    on_another = jax.device_put(PARAMS, jax.devices()[5])
    host = jax.device_get(PARAMS)
    model = make_decoder(CONFIG, remat="full")
    assert {key(), key(params=reordered), key(params=on_another), key(params=host), key(model=model)} == {key()}
    batched = [key(pairs=make_pair_set(PAIRS, size).pairs) for size in (1, 3)]
    assert batched == [key(), key()]


def test_a_key_is_a_file_name():
    assert len(key()) == 64
    assert set(key()) <= set("0123456789abcdef")


# The cache


def never() -> PairLogps:
    raise AssertionError("computed though cached")


def same(one: PairLogps, other: PairLogps) -> bool:
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in NAMES)


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    """A cache file, written."""
    out = tmp_path / "new" / "key.npz"
    assert same(cached(out, lambda: LOGPS), LOGPS)
    return out


def test_a_cache_is_read_back_bit_for_bit_without_computing(path):
    found = cached(path, never)
    assert same(found, LOGPS)
    assert {getattr(found, n).dtype for n in NAMES} == {np.dtype(np.float32)}
    assert found.prompt is None
    assert sorted(file.name for file in path.parent.iterdir()) == ["key.npz", "key.npz.sum"]


@pytest.mark.parametrize("share", [0, 0.001, 0.03, 0.5, 0.99])
def test_a_truncated_file_is_made_anew(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    other = PairLogps(*(2 * getattr(LOGPS, n) for n in NAMES))
    assert same(cached(path, lambda: other), other)
    assert same(cached(path, never), other)


@pytest.mark.parametrize("name", ["key.npz", "key.npz.sum"])
def test_one_flipped_bit_anywhere_is_found_and_the_file_made_anew_with_one_line(path, name, capsys):
    file = path.with_name(name)
    whole = file.read_bytes()
    for bit in np.random.default_rng(0).integers(8 * len(whole), size=20):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(AssertionError, match="computed though cached"):
            cached(path, never)
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"{path} is damaged; the reference's log-probabilities are computed anew"
    assert same(cached(path, lambda: LOGPS), LOGPS)
    assert same(cached(path, never), LOGPS)


@pytest.mark.parametrize("content", [b"", b"not a cache at all", b"PK\x03\x04"])
def test_a_file_of_another_kind_is_made_anew(path, content):
    with sealed(path) as part:
        part.write_bytes(content)
    assert same(cached(path, lambda: LOGPS), LOGPS)


def test_a_file_that_lacks_a_column_is_made_anew(path):
    with sealed(path) as part, part.open("wb") as file:
        np.savez(file, chosen=LOGPS.chosen, rejected=LOGPS.rejected)
    assert same(cached(path, lambda: LOGPS), LOGPS)
    assert same(cached(path, never), LOGPS)


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, mark: pathlib.Path):
        self.mark = mark

    def __reduce__(self):
        return pathlib.Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["array in a zip", "plain pickle"])
def test_no_pickle_is_loaded(path, kind, tmp_path):
    mark = tmp_path / "executed"
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap(mark)], dtype=object), allow_pickle=True)
    with sealed(path) as part:
        if kind == "array in a zip":
            with zipfile.ZipFile(part, "w") as file:
                for name in NAMES:
                    file.writestr(f"{name}.npy", buffer.getvalue())
        else:
            part.write_bytes(buffer.getvalue()[buffer.getvalue().index(b"\x80") :])
    assert same(cached(path, lambda: LOGPS), LOGPS)
    assert not mark.exists()
    np.load(io.BytesIO(buffer.getvalue()), allow_pickle=True)
    assert mark.exists(), "the trap does not work"


def test_an_interrupted_write_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    """Killed half way, the file is not under its name; an old one stays as it was."""
    path = tmp_path / "key.npz"

    def half(file, **arrays):
        file.write(b"PK\x03\x04 half")
        assert not path.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        with pytest.raises(KeyboardInterrupt):
            cached(path, lambda: LOGPS)
    assert not path.exists()
    assert list(tmp_path.iterdir()) == [], "litter"
    assert same(cached(path, lambda: LOGPS), LOGPS)


def test_a_computation_that_fails_writes_nothing(tmp_path):
    with pytest.raises(AssertionError):
        cached(tmp_path / "key.npz", never)
    assert list(tmp_path.iterdir()) == []
