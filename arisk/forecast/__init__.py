"""Whether, and when: the rollout, the forecasters, the verdict, and what-if."""
