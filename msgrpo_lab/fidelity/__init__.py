"""How faithful a credit rule is: its advantages, and the policy gradient they induce, held against the exact ones.

`meter.py` measures; `statistics.py` and `gradients.py` are its arithmetic; `truth.py` and `action_probs.py` ask the
oracle and the policy; `rollout_file.py` keeps rollouts in files; `table.py` shows what was measured.
"""
