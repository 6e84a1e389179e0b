"""The three data sets: where rows come from, how they become prompts, how prompts become tensors."""
