"""Why, and where safety lives: collect, subspace and score at the aligned point θ*."""
