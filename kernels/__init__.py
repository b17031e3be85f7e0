"""Ops that models and graphs share: a plain reference of each, Triton and library forms, and a spec of each.

`spec` has what an op is as data, `op` makes the torch op of a spec, `tuning` chooses the form that runs, and `catalog`
lists all ops. `attention`, `rope` and `philox` are plain torch that the references and models build on.
"""
