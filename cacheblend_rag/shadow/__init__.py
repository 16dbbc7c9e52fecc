"""Quality on live traffic: which blended requests are computed a second time, exactly, and what
the controller of ratios makes of it. Pure: no tensors, threads or clocks.
"""

from cacheblend_rag.shadow.controller import LADDER, Aim, Controller, Decision
from cacheblend_rag.shadow.options import ShadowOptions
from cacheblend_rag.shadow.sampling import Drawn, Figures, Sampler, Shadowed, ShadowJob

__all__ = [
    "LADDER",
    "Aim",
    "Controller",
    "Decision",
    "Drawn",
    "Figures",
    "Sampler",
    "ShadowJob",
    "ShadowOptions",
    "Shadowed",
]
