"""A vector field as a graph of PyTorch's operations, for every engine that compiles.

dynamo: f captured by PyTorch's Dynamo. held: which capture a field is like, and with which tensors. trace: f and its
products as graphs of operations of ATen. surroundings: what lies around a call and keeps such code from standing for f.
"""
