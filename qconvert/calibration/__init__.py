"""Calibration: streams of activations to statistics, and these to static ranges and files.

From below: `exact`, `fixed_point` and `gram` are sums without rounding; `grid` is the record of a
static range; `observers` find ranges; `layer` is all that is observed of one layer. `document` and
`file` are the calibration file, `digest` says of which model it is. `collected` is a run's
calibration in memory and what merges it, `same_run` says whether a state is of this run. `recorded`
and `column_norms` read what is observed; `importance` writes for llama.cpp.
"""
