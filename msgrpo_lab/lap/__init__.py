"""Language-agent policies: prompt, causal language model with its decoding rule, parser. Nothing of training."""
