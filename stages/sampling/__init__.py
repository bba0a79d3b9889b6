"""Which bins are sampled, and which set each belongs to, by seed and sibling group."""
