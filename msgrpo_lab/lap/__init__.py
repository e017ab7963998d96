"""Language-agent policies: prompt builder, causal language model with its decoding rule, parser. Nothing of training."""
