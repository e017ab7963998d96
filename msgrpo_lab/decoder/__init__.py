"""How a causal language model is run over a tree of tokens: each distinct token once."""
