"""The block-step compiler: passes traced to graphs, rewritten, lowered to programs, planned and launched.

`types` and `passes` are the data, `trace` and `normal` make a graph, `match`, `edit` and `rewrites/` change it,
`validate` and `interpret` test it, `lowering` and `program` are the flat form, `plan`, `launch` and `capture` run it,
`codec` stores it, `cost` counts it, and `show/` prints and draws it. `paged_attention`, `staged_attention` and
`tables` are self-attention over pages, for the eager runtime and the tracer alike.
"""
