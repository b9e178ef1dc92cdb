"""What `plan` says of its figures: one recommendation with its command lines, and the page a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.command_lines import command_line, extract_command
from pipeline.commands.projection import widths_text
from pipeline.lookup.recipe import told_apart
from pipeline.recipe import Recipe
from pipeline.terminal import size_text, table_text

if TYPE_CHECKING:
    from pipeline.cost.plan import Plan
    from pipeline.cost.workload import Workload


PYRAMID, BRANCHES = "the pyramid alone", "branches and pyramid"  # of E³VA's states, as the table calls them


def split_limit(rows: dict[str, int], fits: int, views: int = 1) -> int:
    """The largest --limit, which holds for each split, whose rows are at most `fits` in all; 0 where there is none.
    `views`: how many training rows an image gives."""
    times = {split: views if split == "train" else 1 for split in rows}
    limit, left, shares = 0, fits, sum(times.values())
    for split, n in sorted(rows.items(), key=lambda entry: entry[1] // times[entry[0]]):
        # The smallest split that is left is taken whole if an equal share of what is left holds it.
        limit = left // shares
        if limit < n // times[split]:
            return limit
        left, shares = left - n, shares - times[split]
    return max(n // times[split] for split, n in rows.items())


def both(recipe: Recipe, apart: Mapping[str, Any]) -> list[str]:
    """The command that extracts and the one that trains, with the options `apart` that only the latter lacks."""
    return [extract_command(recipe), command_line("train", replace(recipe, **apart))]


def recommend(plan: Plan, work: Workload, recipe: Recipe, budget: float | None, memory: float | None) -> None:
    """Fill in `recommendation` and `commands`."""
    stored = plan.format if plan.projection == "none" else f"{plan.format}, {plan.projection}"
    total = plan.formats[stored]["total"]
    recipe = replace(recipe, tuner=work.tuner, format=plan.format)
    apart = told_apart(recipe, {**work.space, "format": plan.format})
    plan.commands, live = both(recipe, apart), command_line("train", replace(recipe, live=True, **apart))
    if budget is not None and total > budget:
        rows = int(work.samples * budget / total)
        limit = split_limit(plan.rows, rows, recipe.views or 1)
        over = f"{size_text(total)} as {stored} is over the budget of {size_text(budget)}"
        small = plan.formats.get(f"{plan.format}, {PYRAMID}", {}).get("total")
        if small is not None and small <= budget:
            plan.recommendation = (
                f"{over}; {PYRAMID} takes {size_text(small)}: cache that for --tuner fixed, or run {work.tuner} with "
                "--live"
            )
            plan.commands = [*both(replace(recipe, tuner="fixed", tuner_options={}), apart), live]
        elif limit:
            plan.recommendation = f"{over}: it holds about {rows:,} rows; keep fewer --layers or set --limit"
            plan.commands = both(replace(recipe, limit=limit), apart)
        else:
            plan.recommendation = f"{over}, which does not hold a row of each split: give more"
            plan.commands = []
    elif memory is not None and plan.memory["total"] > memory:
        size = max(1, int(work.batch_size * memory / plan.memory["total"]))
        accumulate = recipe.accumulate * -(-work.batch_size // size)
        plan.recommendation = (
            f"training takes {size_text(plan.memory['total'])}, over {size_text(memory)}: a batch of {size} and "
            f"--accumulate {accumulate} do the same with less"
        )
        smaller = replace(recipe, batch_size=size, accumulate=accumulate, tier="auto", host_memory="0")
        smaller = smaller if recipe.tier == "auto" else replace(smaller, tier="disk", host_memory=None)
        plan.commands = both(smaller, apart)
    elif plan.pays:
        plan.recommendation = (
            f"cache: extraction is paid back after {plan.break_even[plan.tier]:.1f} of {plan.epochs} epochs, and every "
            f"further epoch, seed or tuner is {plan.live_epoch / (plan.cached_epoch[plan.tier] or 1):.1f} times faster"
        )
    else:
        cached, even = plan.cached_epoch[plan.tier] or 0.0, plan.break_even[plan.tier]
        took = f"an epoch from {plan.tier} takes {cached:.3g} s, with the backbone live {plan.live_epoch:.3g} s"
        if plan.as_fast:
            plan.recommendation = (
                f"live is as fast: {took}. A store ({size_text(total)}) would be good for machines that cannot hold "
                "the backbone, and for sweeps, whose seeds and settings share each batch"
            )
        else:
            late = f"extraction is paid back only after {even or 0:.0f} epochs, you plan {plan.epochs}"
            plan.recommendation = (
                f"caching does not pay in time here: {took if even is None else late}. It still saves the backbone's "
                "memory, and pays when several seeds or tuners share the states"
            )
        plan.commands = both(replace(recipe, live=True), apart)
        if f"{plan.format}, {PYRAMID}" in plan.formats:
            small = plan.formats[f"{plan.format}, {PYRAMID}"]["total"]
            plan.recommendation += f". {PYRAMID.capitalize()}, for --tuner fixed, is {total / small:.1f} times smaller"


def _rates_head(plan: Plan) -> str:
    """Whether the rates are new."""
    if plan.rates_of is None:
        return "measured here"
    some = f", {plan.measured} measured now" if plan.measured else ""
    return f"rates of {plan.rates_of[:10]}{some} (--measure: all anew)"


def plan_text(plan: Plan, work: Workload) -> str:
    """What a person reads."""

    def seconds(value: float | None) -> str:
        return "–" if value is None else f"{value:,.3g} s" if value < 7200 else f"{value / 3600:,.1f} h"

    rows = ", ".join(f"{s} {n:,}" for s, n in plan.rows.items())
    lengths = ", ".join(f"{s} {n:.1f}" for s, n in plan.positions.items())
    how = " (estimated from words: no tokenizer at hand)" if plan.estimated_lengths else ""
    even = plan.break_even
    tiers = [
        [
            tier + (" (1 Gbit/s assumed)" if tier == "remote" else ""),
            seconds(s),
            "–" if s is None else f"{plan.live_epoch / s:.1f}",
            "–" if even[tier] is None else f"{even[tier]:.1f}",
        ]
        for tier, s in plan.cached_epoch.items()
    ]

    def shown(size: float) -> str:
        return f"{size / 1e3:,.1f} kB" if size >= 1e3 else f"{size:,.0f} B"

    each = [what for what in ("bytes a token", "bytes a sample") if what in next(iter(plan.formats.values()))]
    formats = [[f, *(shown(v[w]) for w in each), size_text(v["total"])] for f, v in plan.formats.items()]
    ops = plan.operations
    head = ""
    if "bound" in ops:
        share = ops["head a step"] / ops["tuner a step"]
        head = f"; {share:.0%} of a step is the frozen head, whatever the tuner: at most {ops['bound']:.1f}"
    memory = ", ".join(f"{k} {size_text(v)}" for k, v in plan.memory.items() if k != "total")
    parts = ", ".join(f"{n:,} in the {what}" for what, n in plan.parameters.items())
    fits = ", ".join(f"{n:,} in {gb}" for gb, n in plan.largest_batch.items())
    r = plan.rates
    cold = "cold not measurable" if r["disk_cold"] is None else f"cold {size_text(r['disk_cold'])}/s"
    image = f", an image read in {r['image']:.3g} s" if r["image"] else ""
    return "\n".join(
        [
            f"{plan.samples:,} samples ({rows}); mean positions of a training sample: {lengths}{how}",
            f"{work.tuner} reads {widths_text(plan.states, work.backbone)}",
            "",
            table_text(["format", *(what.removeprefix("bytes ") for what in each), "in all"], formats),
            "",
            f"extraction: {seconds(plan.extraction_seconds)}, once; live epoch: {seconds(plan.live_epoch)}",
            table_text(["cached epoch from", "seconds", "live ÷ cached", "break-even epochs"], tiers),
            f"operations live ÷ cached: {ops['ratio']:.1f}{head}",
            f"trainable parameters: {parts}",
            f"training memory: {size_text(plan.memory['total'])} ({memory}), computed from tensors",
            f"largest batch: {fits}",
            f"{_rates_head(plan)}: backbone {(r['backbone'] or 0) / 1e9:,.0f} GFLOP/s, step {r['step']:.3g} s, "
            f"decoding {size_text(r['decode'] or 0)}/s, disk written {size_text(r['disk_write'] or 0)}/s, warm "
            f"{size_text(r['disk_warm'] or 0)}/s, {cold}{image}",
            "",
            plan.recommendation,
            *(f"  {line}" for line in plan.commands),
        ]
    )
