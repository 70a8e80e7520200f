"""The native engine: everything in PyTorch, nothing but torch needed."""
