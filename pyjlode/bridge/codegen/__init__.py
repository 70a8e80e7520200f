"""Vector fields written in PyTorch, as Julia code: no Python runs during a solve.

`pyjlode.capture` gives the graph of f and of its products. ops, code: element-wise operations as expressions. scalar: a
graph as straight-line code. array: a graph as loops and matrix products over buffers. program: the functions of one
field, made when first asked for. field: a field for the solvers, verified at first use.
"""
