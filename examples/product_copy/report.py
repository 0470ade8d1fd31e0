"""What a run found, as text for the terminal and as a Markdown report."""

from __future__ import annotations

import math

from examples.product_copy.results import LOGIT_BOUND, LOSS_BOUND, Results, Sample, SideResult, Spread

PLOT = "loss_curves.png"
_KIB, _MIB = 2.0**10, 2.0**20


def table(results: Results) -> list[tuple[str, str, str]]:
    """The two sides next to each other: what, fused_lora's, PEFT's."""
    ours, peft = results.sides

    def row(what: str, shown: str, *values: float) -> tuple[str, str, str]:
        return what, shown.format(values[0]), shown.format(values[1])

    def median(side: SideResult) -> float:
        return Spread.of(side.seconds).median

    return [
        row("training loss, first step", "{:.4f}", ours.losses[0], peft.losses[0]),
        row("training loss, last step", "{:.4f}", ours.losses[-1], peft.losses[-1]),
        row("held-out loss before", "{:.4f}", ours.heldout_before, peft.heldout_before),
        row("held-out loss after", "{:.4f}", ours.heldout_after, peft.heldout_after),
        row("median step time", "{:.3f} s", median(ours), median(peft)),
        row("saved for backward", "{:.1f} MiB", ours.saved_bytes / _MIB, peft.saved_bytes / _MIB),
    ]


def findings(results: Results) -> list[str]:
    """The comparison in sentences, each with its figures and, where there is one, its bound."""
    handover, ratio = results.handover, results.ratio
    saved = results.peft.saved_bytes - results.ours.saved_bytes
    memory = f"{abs(saved) / _MIB:.1f} MiB {'less' if saved > 0 else 'more'} than" if saved else "the same as"
    differ = f"differ by at most {results.loss_difference:.2g}"
    if results.loss_difference == 0:
        differ = "are identical to the bit"
        if math.frexp(results.settings["alpha"] / results.settings["r"])[0] == 0.5:
            differ += ", as alpha / r is a power of two and the scaling rounds nothing"
    return [
        f"The loss curves {'coincide' if results.coincide else 'do not coincide'}: they {differ} "
        f"(bound on the difference: {LOSS_BOUND:g}).",
        f"A step of PEFT's took {ratio.median:.3f} times as long as ours on the same batch: the median of "
        f"{len(results.ours.seconds)} pairs, half of them between {ratio.low:.3f} and {ratio.high:.3f}.",
        f"fused_lora saves {memory} PEFT for backward in one step.",
        f"{results.trained:,} of {results.total:,} parameters train, "
        f"{100 * results.trained / results.total:.3f} %, in {results.layers} layers.",
        f"The saved adapter ({handover.file_bytes / _KIB:,.0f} KiB), loaded by stock PEFT, gives logits that "
        f"differ from ours by at most {handover.difference:.2g} (bound: {results.logit_bound:.2g}, which is "
        f"{LOGIT_BOUND:g} of the largest logit); the adapter itself moves them by up to "
        f"{handover.effect:.2g}.",
    ]


def terminal(results: Results) -> str:
    """The figures for who ran it."""
    rows = [("", "fused_lora", "PEFT"), *table(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in rows]
    lines += ["", *findings(results)]
    for sample in results.samples:
        lines += ["", sample.title]
        lines += [f"  {who:<7} {text}" for who, text in _voices(sample)]
    return "\n".join(lines)


def markdown(results: Results) -> str:
    """The whole report."""
    settings, examples = results.settings, results.examples
    parts = ["# Product copy: one run with fused_lora, the same run with stock PEFT"]
    parts.append(
        f"{settings['model']}, frozen, with adapters on `{settings['targets']}` (r = {settings['r']}, "
        f"alpha = {settings['alpha']:g}, no dropout), learns the completions of {settings['data']} "
        f"from their prompts: {settings['steps']} steps of AdamW with {settings['batch_size']} examples "
        f"each, learning rate up to {settings['lr']:g}, float32 on the CPU. {examples['train']} examples "
        f"train, {examples['heldout']} are held out. Both sides start from the same adapter values, see the "
        "same batches, and step in turn in one loop, the first to go alternating. Losses are means over the "
        "tokens of the completion and the token that ends it."
    )
    if examples["cut"]:
        parts.append(
            f"Examples longer than {settings['max_length']} tokens, which lost their end: {examples['cut']}."
        )
    if results.failures():
        parts.append("**This run failed:** " + "; ".join(results.failures()) + ".")
    parts.append(f"![Loss curves and step times of both sides]({PLOT})")
    parts.append(
        "\n".join(
            [
                "| | fused_lora | PEFT |",
                "|---|---:|---:|",
                *(f"| {what} | {ours} | {peft} |" for what, ours, peft in table(results)),
            ]
        )
    )
    parts.append("\n".join(f"- {sentence}" for sentence in findings(results)))
    parts.append("## The first of the held-out examples\n\nGreedy decoding; nothing picked or edited.")
    parts += [_sample(sample) for sample in results.samples]
    parts.append("## What it ran on")
    rows = [f"| {name} | {value} |" for name, value in results.machine.items()]
    parts.append("\n".join(["| | |", "|---|---|", *rows, f"| whole run | {results.minutes:.1f} minutes |"]))
    parts.append(
        "Saved for backward: the storages that autograd keeps from forward to backward, each once, without "
        "parameters. Step time: forward, backward and optimiser."
    )
    return "\n\n".join(parts) + "\n"


def _sample(sample: Sample) -> str:
    asked = "\n".join(f"> {line}".rstrip() for line in sample.prompt.splitlines())
    texts = "\n".join(f"- **{who}** {text}" for who, text in _voices(sample))
    return f"### {sample.title}\n\n{asked}\n\n{texts}"


def _voices(sample: Sample) -> list[tuple[str, str]]:
    return [("Shop:", sample.shop), ("Before:", sample.before), ("After:", sample.after)]
