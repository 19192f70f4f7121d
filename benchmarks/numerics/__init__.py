"""How exact the answers are: tables, each written by one module as rows under `benchmarks/results/`.

`float32_parity` compares with the authors' own code, `family_parity` with the code of other families, LXT and zennit,
`trust_check` measures the check that finds bad answers, `stable_composite` the well-conditioned composite, and
`localisation` whether the maps point at the truth.
Every module runs as `python -m benchmarks.numerics.<name>`.
"""
