"""The engine on the policy's own weights: prompts are read once, every distinct answer is continued once."""
