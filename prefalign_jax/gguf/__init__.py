"""GGUF, the one-file format of llama.cpp, as a source of models: `file` reads it, `tokenizer` makes its tokenizer."""
