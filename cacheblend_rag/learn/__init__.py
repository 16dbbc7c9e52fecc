"""Learning from traffic: which text of prompts comes again, and when it is worth computing. Pure:
no tensors and no threads; times are arguments.
"""

from cacheblend_rag.learn.budget import Budget
from cacheblend_rag.learn.learner import Learner, Prompt, Span
from cacheblend_rag.learn.options import LearnOptions
from cacheblend_rag.learn.repeats import Repeats

__all__ = ["Budget", "LearnOptions", "Learner", "Prompt", "Repeats", "Span"]
