"""What a model computes, operation by operation; knows nothing of stored bits."""
