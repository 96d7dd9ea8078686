"""From a recipe and the name of a defect to evidence and the verdict that it must meet."""

from __future__ import annotations

from collections.abc import Mapping

from snpbook.attest.roots import named_roots
from snpbook.evidence.defect import Defect
from snpbook.evidence.kit import ROOT_SET, Kit, Verdict
from snpbook.evidence.maker import Maker, Recipe
from snpbook.evidence.origin import origin_defects
from snpbook.evidence.wishes import content_defects

DEFECTS: Mapping[str, Defect] = {defect.name: defect for defect in (*origin_defects(), *content_defects())}
"""By name, in the order of the checks that refuse them."""


def make(recipe: Recipe, defect: str | None = None) -> tuple[Kit, Verdict]:
    """Evidence with one defect, or none, and what a correct verifier says of it.

    A defect's verdict is declared, not computed. Without one the verdict follows from the recipe's own values.
    `ValueError` for an unknown name, and where the recipe's values keep the defect from being the first that shows.
    """
    maker = Maker(recipe)
    good = maker.kit()
    if defect is None:
        return good, good.judge(named_roots(ROOT_SET))
    if defect not in DEFECTS:
        raise ValueError(f"defect: there is no {defect!r}")
    chosen = DEFECTS[defect]
    if recipe.signer not in chosen.signers:
        raise ValueError(f"defect: {defect} is one of a {' or '.join(chosen.signers)}, not of a {recipe.signer}")
    kit = chosen.spoil(maker, good)
    met = kit.judge(named_roots(ROOT_SET))
    if met != chosen.verdict:
        raise ValueError(
            f"defect: with these values {defect} does not show: the verdict is {met.check or met.stage.name}"
        )
    return kit, chosen.verdict
