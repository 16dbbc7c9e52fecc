"""How good are blended answers? Questions in, answers of every way of serving out, and scores.

``readers`` bring the questions, ``run`` asks them through the engine, ``results`` keeps what came,
``summary`` scores it. See docs/evaluation.md.
"""
