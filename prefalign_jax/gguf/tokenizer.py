"""The tokenizer that a GGUF file describes, as a Hugging Face fast tokenizer.

    gpt2    byte-level BPE: a vocabulary, its merges, and by name how a text is cut before it is merged
    llama   SentencePiece BPE: a vocabulary with scores, from which the merges follow, and bytes for what it lacks

transformers builds such tokenizers too, but only beside PyTorch, and cuts texts as GPT-2 does where it does not know
the name. Here a name that is not in SPLITTINGS is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from prefalign_jax.gguf.file import Gguf
from prefalign_jax.torch_free import tokenizer_library
from prefalign_jax.types import UserError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast as Tokenizer


class Splitting(NamedTuple):
    """How a byte-level tokenizer cuts a text before it merges.

    Attributes:
      pattern: regular expression of a piece; None is GPT-2's.
      digits: every digit is a piece of its own.
      nfc: the text is put in Unicode's form NFC first.
      whole: a piece that is in the vocabulary is that token, whatever the merges make of it.
      bos: a text begins with BOS unless the file says otherwise.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_THREES = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}"
_ONES = rf"{_WORDS}|\p{{N}}|{_SIGNS}"
# Words that a capital letter begins.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT_4O = "|".join(rf"{word}{_CONTRACTIONS}?" for word in _CASED) + rf"|\p{{N}}{{1,3}}|{_CASED_SIGNS}"
_TEKKEN = "|".join(_CASED) + rf"|\p{{N}}|{_CASED_SIGNS}"

_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0")
SPLITTINGS: dict[str, Splitting] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), Splitting()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), Splitting(digits=True)),
    **dict.fromkeys(_LLAMA_3, Splitting(_THREES, whole=True, bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting(_THREES)),
    "qwen2": Splitting(_ONES, nfc=True),
    "deepseek-r1-qwen": Splitting(_ONES),
    "tekken": Splitting(_TEKKEN, whole=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Splitting(_GPT_4O)),
}

SPACE = "▁"  # SentencePiece's space
# llama.cpp's kinds of tokens that are treated in ways of their own.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
_KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")  # special tokens of Phi-3 that do not swallow the spaces after them


class Vocabulary(NamedTuple):
    """Tokens in the order of their ids, and the kind of each."""

    tokens: list[str]
    kinds: list[int]

    def of_kind(self, kind: int) -> list[str]:
        """The tokens of a kind."""
        return [token for token, one in zip(self.tokens, self.kinds, strict=True) if one == kind]


def tokenizer_of(gguf: Gguf) -> Tokenizer:
    """Builds the tokenizer.

    Args:
      gguf: header of the file.

    Returns:
      A Hugging Face fast tokenizer with the file's special tokens and, if it has one, its chat template.

    Raises:
      UserError: the file describes none, or one of a kind that is not built here.
    """
    build = {"gpt2": _byte_level, "llama": _sentence_piece}
    kind = gguf.value("tokenizer.ggml.model", "a string")
    if kind not in build:
        known = ", ".join(build)
        raise UserError(f"{gguf.file}: tokenizer.ggml.model={kind!r} is not supported; supported are {known}")
    vocabulary, ids = _vocabulary(gguf, kind), special_ids(gguf)
    try:
        backend, bos = build[kind](gguf, vocabulary)
        _add_tokens(backend, vocabulary, strip=kind == "llama" and gguf.architecture == "phi3")
        bos = gguf.value("tokenizer.ggml.add_bos_token", "true or false", missing=bos)
        eos = gguf.value("tokenizer.ggml.add_eos_token", "true or false", missing=False)
        _frame(backend, vocabulary, ids.get("bos") if bos else None, ids.get("eos") if eos else None)
        return tokenizer_library().PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **{f"{name}_token": vocabulary.tokens[ids[name]] for name in ("bos", "eos", "unk", "pad") if name in ids},
            chat_template=gguf.value("tokenizer.chat_template", "a string", missing="") or None,
            clean_up_tokenization_spaces=False,
        )
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever they like
        raise UserError(f"{gguf.file}: its tokenizer cannot be built: {one_line(error)}") from None


def special_ids(gguf: Gguf) -> dict[str, int]:
    """The ids of special tokens by what they are for, as far as the file names them: bos, eos, unk, pad, eot, eom.

    The last two end a turn and a message that calls a tool.

    Raises:
      UserError: one is not an id.
    """
    size = len(gguf.value("tokenizer.ggml.tokens", ["a string"], missing=[]))
    keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in _IDS.items()}
    ids = {name: gguf.value(key, "an integer") for name, key in keys.items() if key in gguf.metadata}
    for name, i in ids.items():
        if not 0 <= i < size:
            raise UserError(f"{gguf.file}: {keys[name]}: {i} is not the id of one of {size} tokens")
    return ids


def _vocabulary(gguf: Gguf, kind: str) -> Vocabulary:
    tokens: list[str] = gguf.value("tokenizer.ggml.tokens", ["a string"])
    kinds: list[int] = gguf.value("tokenizer.ggml.token_type", ["an integer"], missing=[_NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise UserError(f"{gguf.file}: tokenizer.ggml.token_type: {len(kinds)} kinds of {len(tokens)} tokens")
    if kind == "llama":  # Gemma's tokens of several spaces are written out, and are merged like others
        blank = [bool(token) and not token.strip(" ") for token in tokens]
        tokens = [SPACE * len(token) if one else token for token, one in zip(tokens, blank, strict=True)]
        kinds = [_NORMAL if one else kind for kind, one in zip(kinds, blank, strict=True)]
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{gguf.file}: tokenizer.ggml.tokens: a token is there twice")
    return Vocabulary(tokens, kinds)


def _byte_level(gguf: Gguf, vocabulary: Vocabulary) -> tuple[Backend, bool]:
    """(tokenizer, whether a text begins with BOS where the file does not say so)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = gguf.value("tokenizer.ggml.pre", "a string")
    if name not in SPLITTINGS:
        known = ", ".join(SPLITTINGS)
        raise UserError(f"{gguf.file}: tokenizer.ggml.pre={name!r} is not supported; supported are {known}")
    splitting = SPLITTINGS[name]
    merges = [tuple(merge.split(" ")) for merge in gguf.value("tokenizer.ggml.merges", ["a string"])]
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    backend = Tokenizer(models.BPE(ids, merges, ignore_merges=splitting.whole))
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if splitting.digits else []
    if splitting.pattern:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, splitting.bos


def _sentence_piece(gguf: Gguf, vocabulary: Vocabulary) -> tuple[Backend, bool]:
    """(tokenizer, whether a text begins with BOS where the file does not say so)."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = vocabulary.tokens
    if "tokenizer.ggml.merges" in gguf.metadata:
        merges = [tuple(merge.split(" ")) for merge in gguf.value("tokenizer.ggml.merges", ["a string"])]
    else:
        scores = gguf.value("tokenizer.ggml.scores", ["a number"])
        if len(scores) != len(tokens):
            raise UserError(f"{gguf.file}: tokenizer.ggml.scores: {len(scores)} scores of {len(tokens)} tokens")
        if gguf.architecture.startswith("gemma"):  # its files have other scores; the ids keep the order of the merges
            scores = [-i for i in range(len(tokens))]
        normal = [(token, score) for token, kind, score in zip(*vocabulary, scores, strict=True) if kind == _NORMAL]
        merges = merges_of(normal)
    ids = {token: i for i, token in enumerate(tokens)}
    unknown = next(iter(vocabulary.of_kind(_UNKNOWN)), None)
    backend = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = gguf.value("tokenizer.ggml.add_space_prefix", "true or false", missing=True)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    read = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(read)
    return backend, True


def merges_of(scored: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges that a vocabulary with scores stands for, the first to be made first.

    SentencePiece joins the neighbours that make the token with the highest score: every way to put a token together
    from two others is a merge, with the token's rank.

    Args:
      scored: (token, score).

    Example:
      >>> merges_of([("a", -3.0), ("b", -4.0), ("ab", -1.0), ("aba", 0.0)])
      [('ab', 'a'), ('a', 'b')]
    """
    ids = {token: i for i, (token, _) in enumerate(scored)}
    merges = []
    for token, score in scored:
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        ways = [(left, right, score) for left, right in cuts if left in ids and right in ids]
        merges += sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))
    merges.sort(key=lambda way: (way[2], len(way[0]), len(way[1])), reverse=True)  # as transformers ranks equals
    return [(left, right) for left, right, _ in merges]


def _add_tokens(backend: Backend, vocabulary: Vocabulary, *, strip: bool) -> None:
    """Lets tokens stand for themselves wherever a text spells them; with `strip` most swallow the spaces after them."""
    from tokenizers import AddedToken

    control = [
        AddedToken(token, normalized=False, special=True, rstrip=strip and token not in _KEEP_SPACES)
        for token in vocabulary.of_kind(_CONTROL)
    ]
    backend.add_special_tokens(control)
    backend.add_tokens([AddedToken(token, normalized=False) for token in vocabulary.of_kind(_USER_DEFINED)])


def _frame(backend: Backend, vocabulary: Vocabulary, bos: int | None, eos: int | None) -> None:
    """Puts BOS before and EOS after every text, those of them that have an id."""
    from tokenizers import processors

    ids = {i: vocabulary.tokens[i] for i in (bos, eos) if i is not None}
    if not ids:
        return
    before, after = ([ids[i]] if i is not None else [] for i in (bos, eos))
    single = [*before, "$A", *after]
    pair = [*single, *(f"{piece}:1" for piece in [*before, "$B", *after])]
    special = [(token, i) for i, token in ids.items()]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
