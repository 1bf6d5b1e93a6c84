"""Training: optimiser, schedules, the local engine, checkpoints, metrics and ``train(cfg)``.

Nothing is imported here, so that ``from fastmim.engine.optim import param_groups`` costs only what it uses.
"""
