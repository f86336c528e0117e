"""Characters that a tokenizer cannot hold: found, counted, and nothing else."""

import itertools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefalign_jax.data.alphabet import Alphabet
from prefalign_jax.data.chat import tokenize_records
from prefalign_jax.data.records import Record
from prefalign_jax.data.remarks import Remarks, lines
from prefalign_jax.data.spelled import SpecialTokens, encoder
from prefalign_jax.data.template import ChatOptions
from prefalign_jax.types import Place, UserError
from templates import tokenizer_of

HELD = "abcxyz AB.\n"
LOST = "é日~\t"
WORDS = st.text(st.sampled_from([*HELD, *LOST]), max_size=8)


def tokenizer_with(normalizer=None, unknown="<unk>", bytes_too=False):
    """A token for each character of HELD, and for nothing else."""
    tokens = ["<unk>", "</s>", *HELD, *(f"<0x{byte:02X}>" for byte in range(256 * bytes_too))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocabulary, [], unk_token=unknown, byte_fallback=bytes_too)
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("unknown", ["<unk>", None], ids=["made unknown", "dropped"])
@settings(deadline=None, max_examples=40)
@given(text=WORDS)
def test_what_is_lost_is_what_does_not_come_back(unknown, text):
    assert Alphabet(tokenizer_with(unknown=unknown)).lost(text) == set(text) - set(HELD)


@pytest.mark.parametrize("make", [lambda: tokenizer_with(bytes_too=True), lambda: tokenizer_of("chatml")])
def test_a_tokenizer_with_all_bytes_holds_everything(make):
    alphabet = Alphabet(make())
    assert alphabet.whole and not alphabet.lost("日本 \U0001f642 é\n\t")


@pytest.mark.parametrize(
    ("normalizer", "text", "lost"),
    [
        (normalizers.Lowercase(), "aBx", {"B"}),
        (normalizers.Replace(tokenizers.Regex(" {2,}"), " "), "a b", set()),  # one space is held
        (normalizers.Replace(tokenizers.Regex(" {2,}"), " "), "a  b", {" "}),  # of two one is lost
        (normalizers.Replace(tokenizers.Regex("\n+"), "\n"), "a\n\nb", {"\n"}),
        (normalizers.NFKC(), "ab", set()),
    ],
)
def test_what_a_normalizer_changes_is_lost(normalizer, text, lost):
    assert Alphabet(tokenizer_with(normalizer)).lost(text) == lost


def test_records_that_lose_characters_are_counted_and_shown():
    pairs = (("x", "日", "a"), ("日本", "b", "c"), ("x", "b", "c"), ("y", "b", "é日"))
    remarks = Remarks()
    tokenize_records([Record(*pair) for pair in pairs], tokenizer_with(), max_length=99, remarks=remarks)
    assert (remarks.unencodable, remarks.in_responses) == (3, 2)
    assert remarks.characters == {"日": 3, "本": 1, "é": 1}
    (line,) = lines(remarks)
    assert "loses characters of 3 records, of 2 in a response ('日', 'é', '本'); data.clean=unencodable" in line


@pytest.mark.parametrize("unknown", ["<unk>", None], ids=["made unknown", "dropped"])
@settings(deadline=None, max_examples=40)
@given(texts=st.lists(st.tuples(WORDS, st.sampled_from(["", "</s>"])), max_size=4))
def test_tokens_lie_where_they_stand_in_the_text(unknown, texts):
    """What the tokenizer itself says is wrong after a character that it drops."""
    text = "".join(itertools.chain(*texts))
    tokenizer = tokenizer_with(unknown=unknown)
    ((ids, places),) = encoder(tokenizer, SpecialTokens(tokenizer))([text], True)
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        begin, end = places.token_to_chars(number)
        assert text[begin:end] == token or token == "<unk>"
        assert {places.char_to_token(at) for at in range(begin, end)} == {number}
    assert unknown or all((places.char_to_token(at) is None) == (one in LOST) for at, one in enumerate(text))


def test_dropped_characters_do_not_move_what_is_trained():
    jinja = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tokenizer_with(unknown=None)
    tokenizer.chat_template = jinja
    says = [("assistant", "a~b"), ("user", "x~y"), ("assistant", "~z~")]
    response = [{"role": role, "content": text} for role, text in says]
    one = Record([{"role": "user", "content": "~~A~~"}], response, [], where=Place("x", 3))
    for chat in (ChatOptions(), ChatOptions(split_special=True)):
        (pair,), _ = tokenize_records([one], tokenizer, max_length=64, chat=chat)
        assert tokenizer.decode(pair.chosen) == "abxyz</s>" and pair.weights(0).tolist() == [1, 1, 0, 0, 1, 1]


def test_tokens_whose_places_nobody_knows_are_refused():
    """Words are split before characters are dropped, so without them there are other tokens."""
    tokenizer = tokenizer_with(unknown=None)
    tokens = {"a": 0, "b": 1, "ab": 2}
    tokenizer.backend_tokenizer.model = models.BPE(tokens, [("a", "b")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("~", "isolated")
    with pytest.raises(UserError, match="drops the characters '~' and does not say where .*data.clean=unencodable"):
        encoder(tokenizer, SpecialTokens(tokenizer))(["a~b"], True)
