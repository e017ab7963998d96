"""Engines: prompt ids to completions, by the policy itself, a server or a script."""
