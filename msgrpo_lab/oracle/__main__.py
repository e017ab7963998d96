"""`python -m msgrpo_lab.oracle`: another name of `python -m msgrpo_lab.difficulty`."""

import runpy

runpy.run_module("msgrpo_lab.difficulty", run_name="__main__", alter_sys=True)
