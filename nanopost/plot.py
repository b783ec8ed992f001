"""python -m nanopost.plot: the curves of runs."""
