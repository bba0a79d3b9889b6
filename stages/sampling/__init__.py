"""Which bins are drawn and which set they go to, by seed and sibling group."""
