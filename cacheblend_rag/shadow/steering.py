"""What of the shadow a prompt's plan depends on: its template, its ratio, and the draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from cacheblend_rag.calibration import ratio_of
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.shadow.controller import Aim, Controller
from cacheblend_rag.shadow.options import ShadowOptions
from cacheblend_rag.shadow.sampling import Drawn, Sampler, Shadowed, template_name
from cacheblend_rag.store.tenants import tenant_id


class Steered(NamedTuple):
    """How a request is served.

    Attributes:
        config: with the ratio.
        why_not: it is not blended.
        share: by which it is drawn.
        of: its template, where there is a shadow.
    """

    config: BlendConfig
    why_not: Why | None = None
    share: float = 0.0
    of: Drawn | None = None


class Steering:
    """That of all requests of an engine; used by one thread at a time."""

    def __init__(self) -> None:
        self.controller = Controller()
        self._samplers: dict[str, Sampler] = {}  # by space

    def open(self, space: str, config: BlendConfig) -> None:
        """Requests of a space come from now on. One that is known goes on as it was."""
        seed = ShadowOptions.of(config.shadow_options).seed
        self._samplers.setdefault(space, Sampler(seed))

    def learn(self, message: Shadowed) -> None:
        """An answer was shadowed."""
        self.controller.learn(message.key, message.ratio, message.changed)

    def steer(
        self,
        asked: BlendConfig,
        config: BlendConfig,
        space: str,
        keys: KeySpace,
        head: Sequence[int],
    ) -> Steered:
        """How a prompt is served that contains chunks.

        Args:
            asked: the request's; config: the same with the ratio that ``auto`` begins at.
            space: name of the request's; keys: its key space.
            head: the token ids that the prompt's template is told by.
        """
        if not config.shadow:
            return Steered(config)
        options = ShadowOptions.of(config.shadow_options)
        template = config.template or template_name(keys.key(()), head)
        of = Drawn(
            namespace=tenant_id(keys.namespace) if keys.namespace else "",
            template=template,
            key=f"{space}/{template}" if asked.is_controlled else "",
            most_tokens=options.most_tokens,
            most_waiting=options.most_waiting,
        )
        if not asked.is_controlled:
            return Steered(config, None, config.shadow, of)
        aim = Aim(
            changed_allowed=config.changed_allowed,
            share=config.shadow,
            most_share=options.most_share,
            least=options.least_ratio,
            most=options.most_ratio,
        )
        ratio, share = self.controller.decide(of.key, ratio_of(config), aim)
        if ratio is None:
            return Steered(config, _why_not(aim), 0.0, of)
        return Steered(replace(config, recompute_ratio=ratio), None, share, of)

    def drawn(self, space: str, steered: Steered) -> Drawn | None:
        """The template of a request that will be blended, if it is drawn."""
        if steered.of is None or not self._samplers[space].draw(steered.share):
            return None
        return steered.of


def _why_not(aim: Aim) -> Why:
    detail = (
        f"more than {aim.changed_allowed:.0%} of this template's answers changed at the ratio "
        f"{aim.ladder[-1]:g}; blending is tried again later"
    )
    return Why(Reason.CHANGED_TOO_OFTEN, detail)
