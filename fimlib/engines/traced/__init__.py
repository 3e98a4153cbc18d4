"""The engine that reads autograd's graph of one forward pass."""
