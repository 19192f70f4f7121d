"""The race: relprop and the packages that people use, on the same models, inputs and machine, in the same run.

`cases` makes models and inputs, `contenders` names who takes part and by which check, `packages` drives the others'
code, `proofs` are those checks, `truths` and `timed` hold the timed answers to their own in float64, `child` runs one
contender in a process of its own, `race` lets them run in turn.
"""
