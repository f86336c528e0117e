"""Characters that a tokenizer cannot hold: found, counted, and nothing else."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from prefalign_jax.data.alphabet import Alphabet
from prefalign_jax.data.chat import tokenize_records
from prefalign_jax.data.records import Record
from prefalign_jax.data.remarks import Remarks, lines
from templates import tokenizer_of

HELD = "abcxyz AB.\n"
WORDS = st.text(st.sampled_from([*HELD, "é", "日", "~", "\t"]), max_size=8)


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
