"""Training: engine, loop, optimizers, schedules, guards, log and checkpoints."""
