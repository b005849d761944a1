"""Shows the user which products of a build are int8, and at what cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from builder.precision import products
from builder.precision.islands import Costs

if TYPE_CHECKING:
    from builder.precision.calibration import Int8Plan
    from builder.settings.config import BuildConfig
    from runtime.trace import Trace


def note(trace: Trace, config: BuildConfig, plan: Int8Plan) -> None:
    """Show the products kept wider than int8, and the feature error of the others."""
    trace.line(
        f"  int8: {config.int8_share(plan.kept):.1%} of the matrix products; the features change by {plan.error:.2%}; "
        f"wider stay: {', '.join(products.words(plan.kept)) or 'none of them'} ({products.OPTION} chooses)"
    )


def show(trace: Trace, config: BuildConfig, plan: Int8Plan) -> None:
    """Show every product's noise in int8, and the cost of keeping it wider."""
    costs, kept, rows = Costs(config), plan.kept, []
    for product, site in plan.sites.items():
        flops, wider = products.flops_of(costs, product), products.elements_of(costs, product)
        wider *= config.itemsize - 1
        figures = (f"{flops / 1e9:.2f}", f"{flops / costs.products:.2%}", f"{wider / 2**20:.2f}", f"{site.noise:.2e}")
        rows.append((str(product), products.PRODUCTS[product.name], *figures, "wider" if product in kept else ""))
    trace.table(("product", "what", "GFLOP", "of products", "weights MiB", "noise", "chosen"), rows)
    trace.line("noise: what int8 in this product alone changes behind its layer, mean square over the variance there")
    note(trace, config, plan)
