"""The tokenizer from a GGUF file gives the ids of the Hugging Face tokenizer that the file was written from."""

import json

import pytest

pytest.importorskip("gguf")

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.gguf.tokenizer import SPACE, merges_of
from prefalign_jax.types import UserError

TEXTS = [
    "The cat sat on the mat, didn't it?",
    "In 1984 there were 12345 cats.\n\n  They sat,   and sat.\r\n",
    "<|im_start|>user\nHello <think> the cat<|im_end|>\n",
    "née Ünal – 猫が12匹 🙂 e\u0301",
    " leading and trailing ",
    "",
]
CORPUS = ["the cat sat on the mat and the dog sat on the cat", "they said hello to user and assistant in 1984"] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_3 = (  # as Llama 3's tokenizer.json has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUTS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES],
    "qwen2": [pre_tokenizers.Split(Regex(LLAMA_3.replace("{1,3}", "")), "isolated"), BYTES],
}


def write(path, kind, tokens, kinds, architecture="llama", **more):
    """A file that holds a tokenizer alone."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def assert_equal(ours, theirs, texts=TEXTS):
    for text in texts:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("name", CUTS)
def test_byte_level_bpe(name, tmp_path):
    backend = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(CUTS[name]), decoders.ByteLevel()
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2])

    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    kinds = [3 if token in SPECIAL else 4 if token == "<think>" else 1 for token in tokens]
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    about = dict(tokenizer_pre=name, token_merges=merges, bos_token_id=1, eos_token_id=2, chat_template=template)
    ours = load_tokenizer(write(tmp_path / "m.gguf", "gpt2", tokens, kinds, **about))
    assert_equal(ours, theirs)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token, ours.chat_template) == (1, 2, None, template)
    starts = name == "llama-bpe"  # which begins a text with BOS unless the file says otherwise
    assert ours("cat").input_ids == [1] * starts + theirs("cat").input_ids
    other = load_tokenizer(
        write(tmp_path / "o.gguf", "gpt2", tokens, kinds, add_bos_token=not starts, add_eos_token=True, **about)
    )
    assert other("cat").input_ids == [1] * (not starts) + theirs("cat").input_ids + [2]
    ours.save_pretrained(tmp_path / "saved")  # as an export does
    assert_equal(load_tokenizer(tmp_path / "saved"), theirs)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_bpe(prefix, tmp_path):
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    hexes = [f"<0x{n:02X}>" for n in range(256)]
    special = ["<unk>", "<s>", "</s>", *hexes]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator(" ".join(CORPUS).split(" "), trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # SentencePiece scores a token by when it was merged, and letters below all of these.
    made = {"".join(pair): -float(rank) for rank, pair in enumerate(model["merges"])}
    scores = [made.get(token, -1000.0) for token in tokens]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    bare = Tokenizer(
        models.BPE(
            model["vocab"], [tuple(x) for x in model["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    bare.normalizer, bare.decoder = backend.normalizer, backend.decoder
    theirs = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    about = dict(token_scores=scores, bos_token_id=1, eos_token_id=2, unk_token_id=0, add_space_prefix=prefix)
    ours = load_tokenizer(write(tmp_path / "m.gguf", "llama", tokens, kinds, **about))
    assert_equal(ours, theirs, [*TEXTS, "<s> the cat</s>", "catthe\u2581cat"])
    assert ours("cat").input_ids[0] == 1 and ours("猫", add_special_tokens=False).tokens()[-3:] == hexes[0xE7:0xE8] + [
        "<0x8C>",
        "<0xAB>",
    ]


def test_tokens_of_spaces_alone_are_merged_and_gemmas_rank_is_the_id(tmp_path):
    """Gemma's files write several spaces out, and their scores do not tell the order of merges."""
    tokens = ["<unk>", "<eos>", "  ", "    ", "ab", "abc", "bc", SPACE, "a", "b", "c"]
    kinds = [2, 3, 4, 4] + [1] * 7
    about = dict(token_scores=[-1000.0] * 11, eos_token_id=1, unk_token_id=0, add_space_prefix=False)
    ours = load_tokenizer(write(tmp_path / "m.gguf", "llama", tokens, kinds, architecture="gemma2", **about))
    assert ours("abc    bc", add_special_tokens=False).tokens() == ["abc", SPACE * 4, "bc"]
    assert merges_of([("ab", 0.0), ("bc", 0.0)]) == []


def test_phi_3s_special_tokens_swallow_the_spaces_after_them(tmp_path):
    tokens = ["<unk>", "<s>", "<|user|>", SPACE, "a", "<0x0A>"]
    about = dict(token_scores=[0.0] * 6, eos_token_id=1, unk_token_id=0, add_space_prefix=False)
    kinds = [2, 3, 3, 1, 1, 6]
    texts = {"phi3": [2, 4], "llama": [2, 5, 3, 4]}
    for architecture, ids in texts.items():
        path = write(tmp_path / f"{architecture}.gguf", "llama", tokens, kinds, architecture=architecture, **about)
        assert load_tokenizer(path)("<|user|>\n a", add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize(
    ("kind", "tokens", "about", "says"),
    [
        ("bert", ["a"], {}, "tokenizer.ggml.model='bert' is not supported; supported are gpt2, llama"),
        ("gpt2", ["a"], {}, "its metadata has no tokenizer.ggml.pre"),
        ("gpt2", ["a"], {"tokenizer_pre": "mine"}, "tokenizer.ggml.pre='mine' is not supported; supported are gpt-2,"),
        ("gpt2", ["a"], {"tokenizer_pre": "gpt-2"}, "its metadata has no tokenizer.ggml.merges"),
        ("gpt2", ["a"], {"tokenizer_pre": "gpt-2", "token_merges": ["a b"]}, "its tokenizer cannot be built: "),
        ("gpt2", ["a"], {"tokenizer_pre": "gpt-2", "token_merges": ["a"]}, "its tokenizer cannot be built: "),
        ("llama", ["a", "a"], {"token_scores": [0.0, 0.0]}, "a token is there twice"),
        ("llama", ["a", "b"], {"token_scores": [0.0]}, "1 scores of 2 tokens"),
        ("llama", ["a", "b"], {}, "its metadata has no tokenizer.ggml.scores"),
        ("llama", ["a"], {"token_scores": [0.0], "eos_token_id": 1}, "eos_token_id: 1 is not the id of one of 1 tok"),
        ("llama", ["a"], {"token_scores": [0.0]}, "the tokenizer has no end-of-sequence token"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(kind, tokens, about, says, tmp_path):
    with pytest.raises(UserError, match=says) as caught:
        load_tokenizer(write(tmp_path / "m.gguf", kind, tokens, [1] * len(tokens), **about))
    assert "\n" not in str(caught.value)
