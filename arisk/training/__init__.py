"""The planned training: recipe, optimizers, schedules, and the one loop that everyone observes."""
