"""From tokens to tensors: the store of Examples on disk, the order they are read in, packing, and the Batch."""
