"""Pure PyTorch forward and explicit backward of every op: the meaning of the op, readable before fast."""
