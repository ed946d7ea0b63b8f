"""Find stored bits, flip them, prove the flips, and restore."""
