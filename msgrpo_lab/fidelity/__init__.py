"""How faithful a credit rule is: its advantages, and the policy gradient they induce, held against the exact ones.

`meter.py` measures, `statistics.py` and `gradients.py` are its arithmetic, `gradients.py` also takes a gradient from logits
to a model's parameters, `rollouts.py` keeps rollouts in files, `table.py` and `figure.py` show what was measured.
"""
