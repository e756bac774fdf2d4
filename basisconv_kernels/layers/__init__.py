"""One ``nn.Module`` an op: parameters, initial values and conversion; ``forward`` is one call of the op."""
