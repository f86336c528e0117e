"""Public chat templates, restated small: what they write where, what they leave out, what they look at.

Each file is named after the family whose behaviour it has. The texts of their system prompts are shortened.
"""

from pathlib import Path

from prefalign_jax.data.chat import load_tokenizer

TRL = Path(__file__).parents[1] / "goldens" / "trl"  # a byte-level tokenizer of 512 tokens
JINJA = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.jinja"))}
# Family -> (beginning of a text, end of a turn).
ENDS = {
    "chatml": (None, "<|im_end|>"),
    "deepseek_r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek_v3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gemma3": ("<bos>", "<end_of_turn>"),
    "llama31": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "phi3": (None, "<|endoftext|>"),
    "qwen25": (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "smollm3": (None, "<|im_end|>"),
}
SPECIAL = """<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <|user|> <|end|>
    <|assistant|> <|system|> <｜User｜> <｜Assistant｜> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]
    <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜>""".split()
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # one token each, and not special


def tokenizer_with(jinja, end="<|im_end|>", begin=None):
    """The tokenizer with a template and the tokens of all of these families."""
    tokenizer = load_tokenizer(TRL, jinja)
    tokenizer.add_tokens([*SPECIAL, end, *([begin] if begin else [])], special_tokens=True)
    tokenizer.add_tokens(ADDED)
    tokenizer.eos_token, tokenizer.bos_token = end, begin
    return tokenizer


def tokenizer_of(family):
    """The tokenizer with a family's template and ends."""
    begin, end = ENDS[family]
    return tokenizer_with(JINJA[family], end, begin)
